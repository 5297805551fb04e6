"""Read a safetensors checkpoint in slices, so that a process reads only the rows it needs.

A file is opened for each read and closed after it. Otherwise its memory-mapped pages would count
as memory of this process until the end. Errors in a checkpoint are found before any weight is read.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hqqtrain.config import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Dtypes as safetensors names them.
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class CheckpointReader:
    """The tensors of a Hugging Face folder: `model.safetensors`, or shards with an index.

    Args:
        folder: The folder of the checkpoint.
        aliases: Tensor name -> name of the tensor to read instead, if the checkpoint lacks the
            first one (a tied `lm_head.weight`).
        pin_memory: Return tensors in pinned memory, for asynchronous copies to a GPU.

    Attributes:
        bytes_read: Bytes that `read` has returned so far.
        ahead: Reads to prefetch. One is enough to hide the disk behind quantization.

    Raises:
        UserError: A file is missing, truncated or not a safetensors file, or contains a dtype that
            is not supported.
    """

    def __init__(
        self, folder: Path, aliases: dict[str, str] | None = None, *, pin_memory: bool = False
    ) -> None:
        self.folder = Path(folder)
        self.bytes_read, self.ahead, self._pin_memory = 0, 1, pin_memory
        # Tensor name -> (file, shape, dtype as safetensors names it).
        self._entries: dict[str, tuple[Path, tuple[int, ...], str]] = {}
        for path in _weight_files(self.folder):
            header = _read_header(path)
            self._entries |= {name: (path, shape, kind) for name, (shape, kind) in header.items()}
        _check_index(self.folder, self._entries)
        self._aliases = {a: b for a, b in (aliases or {}).items() if a not in self._entries}

    @property
    def names(self) -> list[str]:
        """Names of all tensors of the checkpoint, sorted."""
        return sorted(self._entries)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors of the checkpoint."""
        sizes = (
            torch.Size(shape).numel() * _DTYPES[kind].itemsize
            for _, shape, kind in self._entries.values()
        )
        return sum(sizes)

    def __contains__(self, name: str) -> bool:
        return self._aliases.get(name, name) in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name)[1]

    def dtype(self, name: str) -> torch.dtype:
        return _DTYPES[self._entry(name)[2]]

    def read(self, name: str, rows: Sequence[slice] | None = None) -> torch.Tensor:
        """Read tensor `name`, or some of its rows.

        Args:
            name: Name of the tensor.
            rows: Slices of dimension 0, which are concatenated; None: all rows. No other rows are
                read from the file.

        Returns:
            A CPU tensor in the dtype of the file, which owns its memory.

        Raises:
            UserError: The checkpoint has no such tensor, or the file is damaged.
        """
        path, shape, _ = self._entry(name)
        rows = [slice(0, n) for n in shape[:1]] if rows is None else rows
        assert all(0 <= r.start <= r.stop <= shape[0] for r in rows), (name, rows, shape)
        with _open(path) as file:
            stored_name = self._aliases.get(name, name)
            if not shape:  # a scalar has no rows
                return self._counted(file.get_tensor(stored_name).clone())
            # Allocate the result once and copy every slice into its place: the result owns its
            # memory, and no second copy of all rows exists.
            stored = file.get_slice(stored_name)
            lengths = [r.stop - r.start for r in rows]
            size = (sum(lengths), *shape[1:])
            tensor = torch.empty(size, dtype=self.dtype(name), pin_memory=self._pin_memory)
            for target, r in zip(tensor.split(lengths), rows, strict=True):
                target.copy_(stored[r.start : r.stop])
        return self._counted(tensor)

    def _counted(self, tensor: torch.Tensor) -> torch.Tensor:
        self.bytes_read += tensor.nbytes
        return tensor

    def check(self, expected: dict[str, tuple[int, ...]]) -> list[str]:
        """Check that the checkpoint contains the tensors of `expected` in their shapes.

        Args:
            expected: Tensor name -> shape.

        Returns:
            The names of tensors in the checkpoint that are not expected, for the caller to report.

        Raises:
            UserError: A tensor is missing or has another shape.
        """
        missing = [name for name in expected if name not in self]
        if missing:
            raise UserError(self._explain_missing(missing, expected))
        for name, shape in expected.items():
            path, found, _ = self._entry(name)
            if found != tuple(shape):
                raise UserError(
                    f"{path}: {name} has shape {list(found)}; the model's config.json requires "
                    f"{list(shape)}. The two files do not belong together."
                )
        used = {self._aliases.get(name, name) for name in expected}
        return [name for name in self.names if name not in used]

    def _explain_missing(self, missing: list[str], expected: dict[str, Any]) -> str:
        where = f"{self.folder}: {len(missing)} of {len(expected)} tensors are missing, among them"
        if len(missing) < len(expected) / 2:
            return f"{where} {missing[0]}. The checkpoint is incomplete: download it again."
        return (
            f"{where} {missing[0]}. Its names (such as {self.names[0] if self.names else 'none'}) "
            "are not those of the architecture in config.json as transformers builds it: convert "
            "the checkpoint with transformers' save_pretrained."
        )

    def _entry(self, name: str) -> tuple[Path, tuple[int, ...], str]:
        stored_name = self._aliases.get(name, name)
        if stored_name not in self._entries:
            raise UserError(f"{self.folder}: contains no tensor named {name}.")
        return self._entries[stored_name]


def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of `folder`, sorted.

    As in transformers, a single file takes precedence over an index.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return [folder / name for name in sorted(set(_weight_map(folder / INDEX).values()))]
    if list(folder.glob("*.bin")) or list(folder.glob("*.pth")):
        raise UserError(
            f"{folder}: its weights are PyTorch .bin or .pth files. These are pickles, which can "
            "run code and cannot be read in slices: convert them to safetensors with "
            "transformers' save_pretrained, or choose a model.revision that has safetensors files."
        )
    raise UserError(
        f"{folder}: contains neither {SINGLE} nor {INDEX}. Only safetensors files are supported."
    )


def _weight_map(path: Path) -> dict[str, str]:
    """Return the index at `path`: tensor name -> name of the file in the same folder."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a safetensors index ({error!r}).") from error
    for name in files:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{path}: names the file {name!r}; shards must be in the same folder.")
    return weight_map


def _check_index(folder: Path, entries: dict[str, tuple[Path, tuple[int, ...], str]]) -> None:
    """Check that every tensor of the index is in the file that the index names."""
    if (folder / SINGLE).is_file():
        return
    for name, file in _weight_map(folder / INDEX).items():
        if name not in entries or entries[name][0].name != file:
            raise UserError(f"{folder / file}: {name} is missing, although {INDEX} lists it.")


def _read_header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return tensor name -> (shape, dtype) of a file, without reading weights."""
    header = {}
    with _open(path) as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            stored = file.get_slice(name)
            kind = stored.get_dtype()
            if kind not in _DTYPES:
                raise UserError(f"{path}: {name} has dtype {kind}, which is not supported.")
            header[name] = (tuple(stored.get_shape()), kind)
    return header


def _open(path: Path) -> Any:
    """Open a safetensors file, and raise UserError if it is missing or damaged."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: missing, although {INDEX} lists it. Download it again."
        ) from error
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: not a complete safetensors file, {path.stat().st_size} bytes ({error}). "
            "Download it again."
        ) from error
