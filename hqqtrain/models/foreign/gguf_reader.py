"""Read the weights of a GGUF file: blocks of linear layers as our packed rows, the rest as dense.

The file is mapped into memory for each read and released after it, as safetensors files are.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hqqtrain.common.errors import UserError
from hqqtrain.common.reading import load_json
from hqqtrain.common.text import count
from hqqtrain.models.foreign.base import AGAIN, ForeignLayer, StoredTensors, make_layout
from hqqtrain.models.foreign.gguf_folder import INDEX
from hqqtrain.models.foreign.gguf_types import BLOCK_TYPES, BlockType
from hqqtrain.models.foreign.reader import ForeignReader
from hqqtrain.models.weights.safetensors import TORCH_DTYPES, Entry
from hqqtrain.quant.spec import QuantSpec

_DENSE_TYPES = {"F32": "F32", "F16": "F16", "BF16": "BF16"}
"""Types of GGUF that are not quantized -> dtypes of safetensors."""

_DEQUANTIZED = "F16"
"""The dtype of dense tensors that the file has quantized, such as embeddings."""

_DENSE_MODULES = ("model.embed_tokens", "lm_head")
"""Modules that stay dense, because hqqtrain leaves them so, too."""


class _Stored(NamedTuple):
    """A tensor of the file."""

    offset: int
    shape: tuple[int, ...]
    type: str
    heads: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of a matrix, or of a vector."""
        if self.type in _DENSE_TYPES:
            return self.shape[-1] * TORCH_DTYPES[_DENSE_TYPES[self.type]].itemsize
        kind = BLOCK_TYPES[self.type]
        return self.shape[-1] // kind.block_size * kind.block_bytes

    @property
    def rows(self) -> int:
        return self.shape[0] if len(self.shape) > 1 else 1


@dataclass(frozen=True)
class GgufLayer(ForeignLayer):
    """A linear layer whose rows are blocks.

    Attributes:
        kind: The type of the blocks.
    """

    kind: BlockType

    def codes(self, stored: StoredTensors, units: slice) -> Tensor:
        blocks = self._blocks(stored, units)
        codes = self.kind.codes(blocks).unflatten(-1, (-1, self.kind.group_size))
        if self.kind.offset:  # a group without scale is constant; see `zero`
            codes = codes.masked_fill(self.kind.scale(blocks)[..., None] == 0, 0)
        return codes.flatten(1)

    def scale(self, stored: StoredTensors, units: slice) -> Tensor:
        scale = self.kind.scale(self._blocks(stored, units)).flatten(1)
        return torch.where(scale == 0, 1, scale) if self.kind.offset else scale

    def zero(self, stored: StoredTensors, units: slice) -> Tensor:
        if self.kind.offset is None:
            shape = units.stop - units.start, self.layout.groups
            return torch.full(shape, self.kind.center)
        offset = self.kind.offset(self._blocks(stored, units)).flatten(1)
        return -offset / self.scale(stored, units)

    def _blocks(self, stored: StoredTensors, units: slice) -> Tensor:
        """Return the blocks of some rows [n, blocks, block_bytes]."""
        rows = stored.read_region(f"{self.name}.weight", units)
        return rows.unflatten(1, (-1, self.kind.block_bytes))


class GgufReader(ForeignReader):
    """The tensors of a GGUF file under the names that transformers gives them.

    Args:
        folder: The folder that `gguf_folder` has made of the file.
        file: The file.
        pin_memory: As in `SafetensorsReader`.

    Raises:
        UserError: The file is shorter than its list of tensors says, or has a type that cannot be
            read.
    """

    def __init__(self, folder: Path, file: Path, *, pin_memory: bool = False) -> None:
        self._file = file
        self._tensors = _read_index(folder, file)
        super().__init__(folder, self._find_layers, pin_memory=pin_memory)
        self.notes = tuple(self._notes())

    def read_region(
        self, name: str, rows: slice | None = None, columns: slice | None = None
    ) -> Tensor:
        """Return rows as bytes, in the order of transformers."""
        stored = self._tensors[name]
        rows = rows or slice(0, stored.rows)
        size = stored.rows * stored.row_bytes
        content = np.memmap(self._file, np.uint8, "r", stored.offset, (size,))
        matrix = content.reshape(stored.rows, stored.row_bytes)
        is_reordered = stored.heads and len(stored.shape) > 1
        region = np.array(matrix[_order(stored)[rows] if is_reordered else rows])
        self.bytes_read += region.nbytes
        return torch.from_numpy(region)

    def check(self, expected: dict[str, tuple[int, ...]]) -> list[str]:
        """Check like `SafetensorsReader.check`; a tensor that is not expected is an error, too.

        The configuration is made of the file's metadata, which may not tell everything.
        """
        if unused := super().check(expected):
            raise UserError(
                f"{self._file}: has {unused[0]}, but the model of its configuration does not. Put "
                "the config.json of the original model into the same folder."
            )
        return []

    def _find_entries(self) -> dict[str, Entry]:
        return {
            name: Entry(self._file, stored.shape, _DENSE_TYPES.get(stored.type, _DEQUANTIZED))
            for name, stored in self._tensors.items()
        }

    def _notes(self) -> Iterator[str]:
        """Yield what becomes of tensors that our format has in another form."""
        types = [self._tensors[f"{module}.weight"].type for module in self.layers]
        rounded = [name for name in types if not BLOCK_TYPES[name].is_exact]
        if rounded:
            names = ", ".join(sorted(set(rounded)))
            yield f"the scales of {count(len(rounded), 'layer')} ({names}) are rounded to fp16"
        for module in _DENSE_MODULES:
            stored = self._tensors.get(f"{module}.weight")
            if stored and stored.type not in _DENSE_TYPES:
                yield f"{module} ({stored.type}) is dequantized, and stays dense in fp16"

    def _find_layers(self, stored: StoredTensors) -> dict[str, ForeignLayer]:
        layers: dict[str, ForeignLayer] = {}
        for name, tensor in self._tensors.items():
            module, kind = name.removesuffix(".weight"), BLOCK_TYPES.get(tensor.type)
            if kind is None or len(tensor.shape) != 2 or module in _DENSE_MODULES:
                continue
            zero = "float" if kind.offset else "integer"
            spec = QuantSpec(kind.nbits, kind.group_size, 1, "gguf", kind.meta_dtype, zero)
            layout = make_layout(stored, module, spec, *tensor.shape)
            layers[module] = GgufLayer(module, spec, layout, (name,), kind)
        return layers

    def _read_dense(self, name: str, rows: Sequence[slice] | None) -> Tensor:
        """Return rows of a tensor that is not one of a quantized layer."""
        stored = self._tensors[name]
        rows = [slice(0, stored.shape[0])] if rows is None else rows
        if len(stored.shape) == 1:  # a vector is one row of bytes, and its elements are the rows
            vector = self._values(stored, self.read_region(name)).flatten()
            vector = vector[_order(stored)] if stored.heads else vector
            tensor = torch.cat([vector[part] for part in rows])
        else:
            tensor = torch.cat([self._values(stored, self.read_region(name, r)) for r in rows])
        return tensor.pin_memory() if self._pin_memory else tensor

    def _values(self, stored: _Stored, content: Tensor) -> Tensor:
        """Return the numbers of rows of bytes."""
        if stored.type in _DENSE_TYPES:
            return content.view(TORCH_DTYPES[_DENSE_TYPES[stored.type]])
        kind = BLOCK_TYPES[stored.type]
        blocks = content.unflatten(1, (-1, kind.block_bytes))
        codes = kind.codes(blocks).float().unflatten(-1, (-1, kind.group_size))
        scale = kind.scale(blocks)[..., None]
        if kind.offset:
            values = codes * scale + kind.offset(blocks)[..., None]
        else:
            values = (codes - kind.center) * scale
        return values.flatten(1).to(TORCH_DTYPES[_DEQUANTIZED])


def _order(stored: _Stored) -> Any:
    """Return for each row of transformers, which row of the file it is.

    llama.cpp turns pairs of neighbors, and transformers pairs that are half a head apart: row
    (head, half, i) of transformers is row (head, i, half) of the file.
    """
    in_file = np.arange(stored.shape[0]).reshape(stored.heads, -1, 2)
    return in_file.swapaxes(1, 2).reshape(-1)


def _read_index(folder: Path, file: Path) -> dict[str, _Stored]:
    """Return the tensors of a file by name, after checking that the file contains them."""
    listed: Mapping[str, Any] = load_json(folder / INDEX)["tensors"]
    size, tensors = file.stat().st_size, {}
    for name, entry in listed.items():
        stored = _Stored(entry["offset"], tuple(entry["shape"]), entry["type"], entry["heads"])
        if stored.type not in (*_DENSE_TYPES, *BLOCK_TYPES):
            raise UserError(
                f"{file}: {name} has the type {stored.type}. Types that can be taken over are "
                f"{', '.join((*_DENSE_TYPES, *BLOCK_TYPES))}; use a file of one of these, or the "
                "safetensors files of the model."
            )
        is_odd = stored.heads and stored.shape[0] % (2 * stored.heads)
        if is_odd or stored.offset + stored.rows * stored.row_bytes > size:
            raise UserError(f"{file}: is damaged or incomplete at {name}; {AGAIN}")
        tensors[name] = stored
    return tensors
