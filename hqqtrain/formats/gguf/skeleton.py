"""Let llama.cpp's converter write the metadata of a family that we do not know.

It converts a dense export, whose file is the skeleton of ours: we take its metadata and its dense
tensors, and put our blocks in the place of each quantized weight. The converter may order the rows
of a weight in its own way. The order is found by matching rows, so nothing has to be known about
the family, and a weight that has become something else is noticed.
"""

import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hqqtrain.common.errors import UserError
from hqqtrain.formats.base import ModelExport
from hqqtrain.formats.gguf.package import import_gguf
from hqqtrain.formats.gguf.writer import DENSE_TYPES, TensorEntry
from hqqtrain.formats.targets.dense import DenseFormat
from hqqtrain.models.weights.safetensors import SafetensorsReader

CONVERTER = "convert_hf_to_gguf.py"


def check_llama_cpp(folder: Path) -> None:
    """Check that `folder`, the value of `export.llama_cpp`, has the converter.

    Raises:
        UserError: It does not.
    """
    if not (folder / CONVERTER).is_file():
        raise UserError(
            f"export.llama_cpp={folder}: contains no {CONVERTER}; give a checkout of llama.cpp, "
            "as git clone makes it."
        )


class SkeletonConversion:
    """The conversion of a model as llama.cpp's converter does it."""

    def __init__(
        self, export: ModelExport, dtype: torch.dtype, llama_cpp: Path, work: Path
    ) -> None:
        """Convert the dense weights of `export`. Collective.

        Args:
            export: The model.
            dtype: The dtype of dense matrices.
            llama_cpp: The folder with the converter.
            work: A folder to create for the dense weights and the skeleton.

        Raises:
            UserError: The converter fails, or changes a weight.
        """
        self._work, comm = work, export.comm
        _check_adapter(export)
        dense = replace(export, adapter=None, adapter_form="none", dtype=torch.float32)
        DenseFormat().write(dense, work / "dense")
        path = work / "skeleton.gguf"
        with comm.raise_on_all_ranks():
            if comm.is_main:
                _run_converter(llama_cpp, work / "dense", path, DENSE_TYPES[dtype].lower())
        self._reader = import_gguf().GGUFReader(path)
        self.architecture: str = self._reader.get_field("general.architecture").contents()
        self._names = _name_map(self.architecture, export.hf_config)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        reader = SafetensorsReader(work / "dense")
        modules = [f"{module}.weight" for module in export.settings.modules]
        self._orders = {name: self._match(name, reader.read(name)) for name in modules}

    def name(self, name: str) -> str:
        """Return the name in GGUF of a tensor of the checkpoint.

        Raises:
            UserError: The converter has not written it under a name that the package `gguf` knows.
        """
        found: str | None = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None or found not in self._tensors:
            raise UserError(
                f"export.llama_cpp: the converter splits or fuses {name}; leave this layer in "
                "quant.skip, or use another export.format."
            )
        return found

    def order(self, name: str) -> Tensor | None:
        """Return the rows of a quantized weight in the order of GGUF; None: the same."""
        return self._orders.get(name)

    def entries(self) -> dict[str, TensorEntry]:
        """Return the dense tensors of the skeleton."""
        return {
            name: TensorEntry(
                tensor.tensor_type.name, tuple(int(size) for size in reversed(tensor.shape))
            )
            for name, tensor in self._dense_tensors()
        }

    def dense(self, name: str, tensor: Tensor) -> Tensor | None:
        """Return None: the skeleton has all dense tensors."""
        return None

    def extra(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the dense tensors of the skeleton, as bytes."""
        for name, tensor in self._dense_tensors():
            yield name, torch.from_numpy(np.array(tensor.data).view(np.uint8))

    def write_metadata(self, writer: Any) -> None:
        """Copy the metadata of the skeleton, but for what the writer already has."""
        kinds = import_gguf().GGUFValueType
        for field in self._reader.fields.values():
            if field.name.startswith("GGUF.") or field.name in writer.kv_data[0]:
                continue
            kind = field.types[0]
            sub_type = field.types[-1] if kind == kinds.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=sub_type)

    def finish(self) -> None:
        """Remove the dense weights and the skeleton."""
        shutil.rmtree(self._work)

    def _dense_tensors(self) -> Iterator[tuple[str, Any]]:
        quantized = {self.name(name) for name in self._orders}
        yield from ((k, v) for k, v in self._tensors.items() if k not in quantized)

    def _match(self, name: str, weight: Tensor) -> Tensor | None:
        """Return the rows of `weight` in the order of the skeleton; None: the same."""
        tensor = self._tensors[self.name(name)]
        dtypes = {kind: dtype for dtype, kind in DENSE_TYPES.items()}
        ours = weight.to(dtypes[tensor.tensor_type.name]).view(torch.uint8).numpy()
        theirs = np.array(tensor.data).view(np.uint8)
        if np.array_equal(ours, theirs):
            return None
        rows: dict[bytes, deque[int]] = {}
        for i, row in enumerate(ours):
            rows.setdefault(_digest(row), deque()).append(i)
        found = [rows.get(_digest(row)) for row in theirs]
        if ours.shape != theirs.shape or not all(found):
            raise UserError(
                f"export.llama_cpp: the converter changes {name}, and not only the order of its "
                "rows; leave this layer in quant.skip, or use another export.format."
            )
        # Equal rows are taken one after the other, so that each is taken once.
        return torch.tensor([places.popleft() for places in found if places])


def _check_adapter(export: ModelExport) -> None:
    """Refuse what an adapter changes of the base, which would be the converter's to convert."""
    if export.adapter is None or export.adapter_form == "none":
        return
    adapted = [name for name in export.adapter.modules if name not in export.settings.modules]
    if changed := [*export.adapter.base_tensors, *adapted]:
        raise UserError(
            f"export.llama_cpp: the adapter changes {changed[0]}, which is not quantized. That is "
            "possible only for the families that hqqtrain knows itself; export the base alone "
            "with export.adapter=none, or use another export.format."
        )


def _digest(row: np.ndarray) -> bytes:
    return blake2b(row.tobytes(), digest_size=16).digest()


def _name_map(architecture: str, config: Any) -> Any:
    gguf = import_gguf()
    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}.get(architecture)
    if arch is None:
        raise UserError(
            f"export.llama_cpp: the installed package gguf does not know {architecture}; install "
            "a newer one."
        )
    return gguf.get_tensor_name_map(arch, config.get_text_config().num_hidden_layers)


def _run_converter(llama_cpp: Path, dense: Path, path: Path, dtype: str) -> None:
    done = subprocess.run(
        [sys.executable, llama_cpp.absolute() / CONVERTER, dense, "--outtype", dtype,
         "--outfile", path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode or not path.is_file():
        reason = (done.stderr.strip().splitlines() or ["it wrote no file"])[-1]
        raise UserError(
            f"export.llama_cpp={llama_cpp}: {CONVERTER} cannot convert the model ({reason}). Run "
            "it on export.format=dense to see all that it prints."
        )
