"""Write a GGUF file whose tensors arrive one by one, in any order."""

from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from hqqtrain.common.files import fsync_path
from hqqtrain.formats.gguf.package import import_gguf

DENSE_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""The types of GGUF for tensors that are not quantized."""


class TensorEntry(NamedTuple):
    """A tensor of a GGUF file.

    Attributes:
        type: The name of its type.
        shape: Its shape, in the order of PyTorch.
    """

    type: str
    shape: tuple[int, ...]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of its bytes."""
        gguf = import_gguf()
        kind = gguf.GGMLQuantizationType[self.type]
        shape: tuple[int, ...] = gguf.quants.quant_shape_to_byte_shape(self.shape, kind)
        return shape

    @property
    def nbytes(self) -> int:
        """The bytes of the tensor."""
        return int(np.prod(self.stored_shape))


class GgufFile:
    """A GGUF file of known tensors.

    The header is written at once, so each tensor has its place, and is not kept in memory.
    """

    def __init__(self, path: Path, writer: Any, entries: Mapping[str, TensorEntry]) -> None:
        """Create the file.

        Args:
            path: The file.
            writer: A `GGUFWriter` with all metadata.
            entries: The tensors, by name.
        """
        gguf = import_gguf()
        for name, entry in entries.items():
            kind = gguf.GGMLQuantizationType[entry.type]
            writer.add_tensor_info(name, entry.stored_shape, np.dtype(np.uint8), entry.nbytes, kind)
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        self._path, self._entries = path, entries
        self._offsets: dict[str, int] = {}
        end = writer.ggml_pad(path.stat().st_size, writer.data_alignment)
        for name, entry in entries.items():
            self._offsets[name] = end
            end += writer.ggml_pad(entry.nbytes, writer.data_alignment)
        self._file: IO[bytes] = path.open("r+b")
        self._file.truncate(end)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, name: str, data: Tensor) -> None:
        """Write a tensor: its blocks, or its values in the dtype of its entry.

        Raises:
            OSError: The disk is full or fails.
        """
        raw = data.detach().contiguous().view(torch.uint8).cpu().numpy()
        assert raw.nbytes == self._entries[name].nbytes, name
        self._file.seek(self._offsets.pop(name))
        self._file.write(raw.data)

    def finish(self) -> None:
        """Flush the file, after all tensors were written."""
        assert not self._offsets, f"tensors are missing: {sorted(self._offsets)}"
        self._file.close()
        fsync_path(self._path)


def dense_type(tensor_shape: tuple[int, ...], dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a dense tensor: llama.cpp computes with norms and biases in fp32."""
    return dtype if len(tensor_shape) > 1 else torch.float32
