"""Files of token sequences, which every rank maps instead of holding them in memory.

Tokens are appended while they are made, so writing needs no memory for those that are done. A file
contains the raw values of arrays, and `store.json` says how many. The digest of the sequences shows
whether a file was torn or altered.
"""

import io
import os
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from hqqtrain.common.files import atomic_write_json
from hqqtrain.common.reading import load_json
from hqqtrain.data.sequences import TokenSequences, chunks

INDEX = "store.json"
"""The file that describes the others; the last one to be written."""

_BUFFER_BYTES = 1 << 20


class DamagedStoreError(ValueError):
    """The files of a store are not those that were written. The message says which, and why."""


class TokenWriter:
    """Appends the tokens of texts to two files, which are mapped at the end.

    Args:
        folder: The folder of the files; None: the tokens stay in memory.
        name: The name of the files, without their extensions.
    """

    def __init__(self, folder: Path | None, name: str) -> None:
        self._files: tuple[IO[bytes], IO[bytes]] = (
            _create(folder, f"{name}.tokens"),
            _create(folder, f"{name}.targets"),
        )
        self._ends = array("q", [0])

    def append(self, ids: np.ndarray, targets: np.ndarray) -> None:
        """Append the tokens of a text, int32 [n], and whether each is trained, bool [n]."""
        self._files[0].write(np.ascontiguousarray(ids, np.int32).data)
        self._files[1].write(np.ascontiguousarray(targets, bool).data)
        self._ends.append(self._ends[-1] + len(ids))

    def finish(self) -> TokenSequences:
        """Return all texts, each as a sequence of its own."""
        bounds, length = np.array(self._ends, np.int64), self._ends[-1]
        starts, ends = bounds[:-1], bounds[1:]
        stream, targets = (
            _mapped(file, dtype, length)
            for file, dtype in zip(self._files, (np.int32, bool), strict=True)
        )
        return TokenSequences(stream, targets, starts, starts, ends)


def save_sequences(
    folder: Path, sequences: Mapping[str, TokenSequences], **description: Any
) -> None:
    """Complete the files of sequences that a `TokenWriter` has begun in `folder`.

    Args:
        folder: The folder.
        sequences: The sequences by the names of their files.
        description: Further JSON values to keep.
    """
    entries = {}
    for name, each in sequences.items():
        with _create(folder, f"{name}.bounds") as file:
            for values in (each.starts, each.begin, each.end):
                for first, last in chunks(len(values)):
                    file.write(np.ascontiguousarray(values[first:last], np.int64).data)
        counts = {"tokens": len(each.stream), "texts": len(each.starts), "sequences": len(each)}
        entries[name] = {**counts, "digest": each.digest}
    atomic_write_json(folder / INDEX, {"sequences": entries, **description})


def map_sequences(folder: Path, name: str) -> TokenSequences:
    """Map sequences that `save_sequences` has completed, and check that they are those.

    Raises:
        DamagedStoreError: A file is missing, torn or altered.
    """
    try:
        entry = load_json(folder / INDEX)["sequences"][name]
        tokens, texts, count = (int(entry[key]) for key in ("tokens", "texts", "sequences"))
        stream = _map_file(folder / f"{name}.tokens", np.int32, tokens)
        targets = _map_file(folder / f"{name}.targets", np.uint8, tokens)
        bounds = _map_file(folder / f"{name}.bounds", np.int64, texts + 2 * count)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedStoreError(f"{folder}: {error}") from error
    starts, begin, end = np.split(bounds, [texts, texts + count])
    if not all(_are_bounds(each, tokens) for each in (starts, begin, end)):
        raise DamagedStoreError(f"{folder / name}.bounds: has other content than was written")
    sequences = TokenSequences(stream, targets.view(bool), starts, begin, end)
    if any(int(targets[a:b].max()) > 1 for a, b in chunks(tokens)) or (
        sequences.digest != entry.get("digest")
    ):
        raise DamagedStoreError(f"{folder / name}.*: have other content than was written")
    return sequences


def describe_store(folder: Path) -> dict[str, Any]:
    """Return the content of `store.json`.

    Raises:
        DamagedStoreError: It cannot be read.
    """
    try:
        content = load_json(folder / INDEX)
    except (OSError, ValueError) as error:
        raise DamagedStoreError(f"{folder / INDEX}: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("sequences"), dict):
        raise DamagedStoreError(f"{folder / INDEX}: does not describe sequences")
    return content


def _create(folder: Path | None, name: str) -> IO[bytes]:
    return io.BytesIO() if folder is None else (folder / name).open("x+b", _BUFFER_BYTES)


def _are_bounds(positions: np.ndarray, tokens: int) -> bool:
    """Whether every number is a position in a stream of so many tokens."""
    return not len(positions) or (int(positions.min()) >= 0 and int(positions.max()) <= tokens)


def _map_file(path: Path, dtype: Any, length: int) -> np.ndarray:
    """Map a file that must have `length` values, and be no link."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        return _mapped(file, dtype, length)


def _mapped(file: IO[bytes], dtype: Any, length: int) -> np.ndarray:
    """Return the values of a file, read-only, or of a buffer in memory."""
    if isinstance(file, io.BytesIO):
        return np.frombuffer(file.getbuffer(), dtype)
    file.flush()
    size = os.fstat(file.fileno()).st_size
    if size != length * np.dtype(dtype).itemsize:
        raise ValueError(f"{file.name}: has {size} bytes and not those of {length} values")
    if not length:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    return np.asarray(np.memmap(file, dtype, "r", shape=(length,)))
