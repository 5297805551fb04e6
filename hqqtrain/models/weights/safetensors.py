"""Read a safetensors checkpoint in slices, so that a process reads only the rows it needs.

A file is opened for each read and closed after it. Otherwise its memory-mapped pages would count
as memory of this process until it ends. Errors in a checkpoint are found before any weight is read.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from hqqtrain.common.errors import UserError
from hqqtrain.common.reading import load_json
from hqqtrain.models.weights.base import NameMatch
from hqqtrain.models.weights.names import missing_message

SINGLE_FILE_NAME = "model.safetensors"
"""The file of a checkpoint that has only one."""

INDEX_FILE_NAME = "model.safetensors.index.json"
"""The file that lists the tensors of a checkpoint of several files."""

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U32": torch.uint32, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""Dtypes by their names in safetensors files."""

_READ_AS = {torch.float8_e4m3fn: torch.bfloat16, torch.float8_e5m2: torch.bfloat16}
"""Stored dtype -> dtype of the result, which represents all values of the stored dtype.

PyTorch computes almost nothing with the 8-bit dtypes.
"""

_COMPARED_ROWS = 1 << 12
"""Rows that are compared at a time to find out whether two tensors are equal."""


class Entry(NamedTuple):
    """Where a tensor is stored, and what its file says about it."""

    path: Path
    shape: tuple[int, ...]
    dtype_name: str
    """A key of `TORCH_DTYPES`."""


class SafetensorsReader:
    """The tensors of a Hugging Face folder: `model.safetensors`, or shards with an index.

    Args:
        folder: The folder of the checkpoint.
        aliases: Tensor name -> name of the tensor to read if the checkpoint lacks the first one,
            as it lacks a tied `lm_head.weight`.
        pin_memory: Return tensors in pinned memory, for asynchronous copies to a GPU.

    Attributes:
        bytes_read: Bytes that `read` has returned so far.
        prefetch_depth: Number of reads that may run before their results are requested. One is
            enough to hide the disk behind quantization.

    Raises:
        UserError: A file is missing, truncated or not a safetensors file, or contains a dtype that
            is not supported.
    """

    def __init__(
        self, folder: Path, aliases: dict[str, str] | None = None, *, pin_memory: bool = False
    ) -> None:
        self.folder = Path(folder)
        self.bytes_read, self.prefetch_depth, self._pin_memory = 0, 1, pin_memory
        self._entries = self._find_entries()
        # Use an alias only where the checkpoint lacks the name.
        own = {name: name for name in self._entries}
        self._match = NameMatch((aliases or {}) | own)

    def _find_entries(self) -> dict[str, Entry]:
        """Return where each tensor is stored, by its name in the checkpoint."""
        entries: dict[str, Entry] = {}
        for path in _weight_files(self.folder):
            entries |= _read_header(path)
        _check_index(self.folder, entries)
        return entries

    def use_names(self, match: NameMatch) -> None:
        """Take tensors by the names of `match.stored`, and by no other name."""
        self._match = match

    def have_same_values(self, first: str, second: str) -> bool:
        """Whether two tensors of the checkpoint, by their stored names, are equal.

        The bytes read are not counted in `bytes_read`, because they are not weights of a model.
        """
        shape, counted = self._entries[first].shape, self.bytes_read
        if shape != self._entries[second].shape:
            return False
        try:
            for start in range(0, shape[0] if shape else 1, _COMPARED_ROWS):
                rows = [slice(start, min(start + _COMPARED_ROWS, shape[0]))] if shape else None
                a, b = (self._read_stored(name, rows) for name in (first, second))
                if not torch.equal(a.double(), b.double()):
                    return False
            return True
        finally:
            self.bytes_read = counted

    @property
    def names(self) -> list[str]:
        """Names of all tensors of the checkpoint, sorted."""
        return sorted(self._entries)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors of the checkpoint."""
        return sum(
            torch.Size(entry.shape).numel() * TORCH_DTYPES[entry.dtype_name].itemsize
            for entry in self._entries.values()
        )

    @property
    def has_8_bit_floats(self) -> bool:
        """Whether a tensor of the checkpoint is stored as 8-bit floating-point numbers."""
        return any(TORCH_DTYPES[entry.dtype_name] in _READ_AS for entry in self._entries.values())

    def __contains__(self, name: str) -> bool:
        return self._match.stored.get(name) in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        dtype = TORCH_DTYPES[self._entry(name).dtype_name]
        return _READ_AS.get(dtype, dtype)

    def read(self, name: str, rows: Sequence[slice] | None = None) -> torch.Tensor:
        """Read tensor `name`, or some of its rows.

        Args:
            name: Name of the tensor.
            rows: Slices of dimension 0, which are concatenated; None: all rows. Only these rows are
                read from the file.

        Returns:
            A CPU tensor that owns its memory. It has the dtype of the file, or bfloat16 if that
            dtype has 8 bits.

        Raises:
            UserError: The checkpoint has no such tensor, or the file is damaged.
        """
        self._entry(name)  # raises if there is no such tensor
        return self._read_stored(self._match.stored[name], rows)

    def _read_stored(self, stored_name: str, rows: Sequence[slice] | None) -> torch.Tensor:
        path, shape, dtype_name = self._entries[stored_name]
        stored_dtype = TORCH_DTYPES[dtype_name]
        dtype = _READ_AS.get(stored_dtype, stored_dtype)
        with open_safetensors(path) as file:
            if not shape:  # a scalar has no rows
                tensor = file.get_tensor(stored_name).to(dtype, copy=True)
            else:
                rows = [slice(0, shape[0])] if rows is None else rows
                assert all(0 <= r.start <= r.stop <= shape[0] for r in rows), (stored_name, rows)
                # Allocate the result once and copy every slice into its place: the result owns its
                # memory, and no second copy of all rows exists.
                stored = file.get_slice(stored_name)
                lengths = [r.stop - r.start for r in rows]
                result_shape = (sum(lengths), *shape[1:])
                tensor = torch.empty(result_shape, dtype=dtype, pin_memory=self._pin_memory)
                for target, r in zip(tensor.split(lengths), rows, strict=True):
                    target.copy_(stored[r.start : r.stop])
        self.bytes_read += tensor.numel() * stored_dtype.itemsize
        return tensor

    def check(self, expected: dict[str, tuple[int, ...]]) -> list[str]:
        """Check that the checkpoint contains the tensors of `expected` in their shapes.

        Args:
            expected: Tensor name -> shape.

        Returns:
            The names of tensors in the checkpoint that are not expected, for the caller to report.
            Empty ones are left out.

        Raises:
            UserError: A tensor is missing or has another shape.
        """
        missing = [name for name in expected if name not in self]
        if missing:
            raise UserError(
                missing_message(self.folder, missing, expected, self.names, self._match)
            )
        for name, shape in expected.items():
            path, stored_shape, _ = self._entry(name)
            if stored_shape != tuple(shape):
                raise UserError(
                    f"{path}: {name} has shape {list(stored_shape)}, which does not match "
                    f"{list(shape)}, the shape that {self.folder / 'config.json'} requires. Use "
                    "the config.json that was saved with these weights."
                )
        used = {self._match.stored[name] for name in expected} | self._match.duplicates
        unused = (name for name in self.names if name not in used)
        return [name for name in unused if 0 not in self._entries[name].shape]

    def _entry(self, name: str) -> Entry:
        if name not in self:
            raise UserError(f"{self.folder}: contains no tensor named {name}.")
        return self._entries[self._match.stored[name]]


def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of `folder`, sorted.

    As in transformers, a single file takes precedence over an index.
    """
    if (folder / SINGLE_FILE_NAME).is_file():
        return [folder / SINGLE_FILE_NAME]
    if (folder / INDEX_FILE_NAME).is_file():
        file_names = set(_read_weight_map(folder / INDEX_FILE_NAME).values())
        return [folder / name for name in sorted(file_names)]
    if list(folder.glob("*.bin")) or list(folder.glob("*.pth")):
        raise UserError(
            f"{folder}: its weights are PyTorch .bin or .pth files. These are pickles, which can "
            "run code and cannot be read in slices: convert them to safetensors with "
            "transformers' save_pretrained, or choose a model.revision that has safetensors files."
        )
    raise UserError(
        f"{folder}: contains neither {SINGLE_FILE_NAME} nor {INDEX_FILE_NAME}. Only safetensors "
        "files are supported."
    )


def _read_weight_map(path: Path) -> dict[str, str]:
    """Read the index at `path`: tensor name -> name of the file in the same folder."""
    try:
        weight_map = load_json(path)["weight_map"]
        file_names = set(weight_map.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a safetensors index ({error!r}).") from error
    for name in file_names:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{path}: names the file {name!r}; shards must be in the same folder.")
    return weight_map


def _check_index(folder: Path, entries: dict[str, Entry]) -> None:
    """Check that every tensor of the index is in the file that the index names."""
    if (folder / SINGLE_FILE_NAME).is_file():
        return
    for name, file_name in _read_weight_map(folder / INDEX_FILE_NAME).items():
        if name not in entries or entries[name].path.name != file_name:
            raise UserError(
                f"{folder / file_name}: {name} is missing, although {INDEX_FILE_NAME} lists it. "
                "Download it again."
            )


def _read_header(path: Path) -> dict[str, Entry]:
    """Return the entries of a file by tensor name, without reading weights."""
    header = {}
    with open_safetensors(path) as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            stored = file.get_slice(name)
            dtype_name = stored.get_dtype()
            if dtype_name not in TORCH_DTYPES:
                raise UserError(
                    f"{path}: {name} has dtype {dtype_name}, which is not supported; use the "
                    "full-precision model that it was made from."
                )
            header[name] = Entry(path, tuple(stored.get_shape()), dtype_name)
    return header


def open_safetensors(path: Path) -> Any:
    """Open a safetensors file, and raise UserError if it is missing, unreadable or damaged."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        # safetensors reports every file that it cannot open as not found.
        if path.exists():
            raise UserError(
                f"{path}: cannot be opened. Check that this user may read the file."
            ) from error
        raise UserError(
            f"{path}: missing, although {INDEX_FILE_NAME} lists it. Download it again."
        ) from error
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: not a complete safetensors file, {path.stat().st_size} bytes ({error}). "
            "Download it again."
        ) from error
