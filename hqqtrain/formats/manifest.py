"""Checksums of a folder, so that a changed or missing byte is found before the files are used.

Disks and copies do lose bytes, and most damaged checkpoints would load without an error.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hqqtrain.common.files import fsync_path

MANIFEST = "manifest.json"

_BLOCK = 1 << 20

_THREADS = 4
"""Files to read at a time: one thread hashes about 2 GB/s, and disks deliver more."""

FileDigest = dict[str, Any]
"""The size (`bytes`) and checksum (`sha256`) of a file."""


class DamagedError(Exception):
    """A file is missing or was changed after it was written. The message names the file."""


def seal(folder: Path, known: Mapping[str, FileDigest] = MappingProxyType({})) -> None:
    """Write the sizes and sha256 of all files of `folder` into its manifest.json.

    Args:
        folder: The folder to seal.
        known: File name -> `file_digest` that file, for files that need not be read again.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    path = folder / MANIFEST
    files = {name: known.get(name) or file_digest(folder / name) for name in names}
    path.write_text(_text(files), encoding="utf-8")
    fsync_path(path)


def check_sealed(folder: Path, rank: int = 0, world_size: int = 1) -> None:
    """Verify a sealed folder: the sizes of all files, and the checksums of this rank's share.

    Args:
        folder: The sealed folder.
        rank: This rank, which reads every `ranks`-th file.
        world_size: The number of ranks that share the work.

    Raises:
        DamagedError: a file is missing or differs from what `seal` found.
    """
    files = sorted(_manifest(folder).items())
    for name, facts in files:
        _check_size(folder / name, facts)
    mine = files[rank::world_size]
    with ThreadPoolExecutor(_THREADS, "checking") as pool:
        actual = list(pool.map(file_digest, [folder / name for name, _ in mine]))
    for (name, expected), facts in zip(mine, actual, strict=True):
        if facts != expected:
            raise DamagedError(f"{folder / name}: is not what was written (its checksum differs)")


def is_sealed(folder: Path) -> bool:
    """Whether `folder` has a manifest. Folders of older versions may have none."""
    return (folder / MANIFEST).is_file()


def file_digest(path: Path) -> FileDigest:
    """Return the size and sha256 of a file.

    Raises:
        DamagedError: the file cannot be read.
    """
    digest, size = hashlib.sha256(), 0
    with _readable(path), path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _check_size(path: Path, facts: FileDigest) -> None:
    with _readable(path):
        size = path.stat().st_size
    if size != facts["bytes"]:
        raise DamagedError(
            f"{path}: is not what was written ({size} bytes instead of {facts['bytes']})"
        )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DamagedError(f"{path}: cannot be read ({error.strerror})") from error


def _manifest(folder: Path) -> dict[str, FileDigest]:
    path = folder / MANIFEST
    try:
        with _readable(path):
            text = path.read_bytes().decode()
        files = json.loads(text)["files"]
        intact = text == _text(files)  # the text includes its own checksum
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise DamagedError(f"{path}: is not what was written")
    return files


def _text(files: Mapping[str, FileDigest]) -> str:
    listed = json.dumps(files, indent=2, sort_keys=True)
    digest = hashlib.sha256(listed.encode()).hexdigest()
    return json.dumps({"sha256": digest, "files": files}, indent=2, sort_keys=True) + "\n"
