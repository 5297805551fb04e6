"""Checksums of a folder, so that a changed or missing byte is found before the files are used.

Disks and copies lose bytes, and most damaged checkpoints would load without an error.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hqqtrain.common.files import fsync_path
from hqqtrain.common.reading import MAX_JSON_BYTES, parse_json, read_bounded

MANIFEST = "manifest.json"

_BLOCK_BYTES = 1 << 20
"""Bytes of a file that are read and hashed at a time."""

_NUM_THREADS = 4
"""Files that are read at a time. One thread hashes about 2 GB/s, and disks deliver more."""

FileDigest = dict[str, Any]
"""The size (`bytes`) and checksum (`sha256`) of a file."""


class DamagedError(Exception):
    """A file is missing or was changed after it was written. The message names the file."""


def seal(folder: Path, known_digests: Mapping[str, FileDigest] = MappingProxyType({})) -> None:
    """Write the sizes and sha256 of all files of `folder`, and of its folders, into manifest.json.

    Args:
        folder: The folder to seal.
        known_digests: Name of a file -> result of `file_digest`, for files that need not be read
            again.
    """
    files = {}
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        name = file.relative_to(folder).as_posix()
        files[name] = known_digests.get(name) or file_digest(file)
    path = folder / MANIFEST
    path.write_text(_manifest_text(files), encoding="utf-8")
    fsync_path(path)


def check_sealed(folder: Path, rank: int = 0, world_size: int = 1) -> None:
    """Verify a sealed folder: the sizes of all files, and the checksums of this rank's share.

    Args:
        folder: The sealed folder.
        rank: This rank, which reads the files `rank`, `rank + world_size`, ... in sorted order.
        world_size: The number of ranks that share the work.

    Raises:
        DamagedError: A file is missing or was changed after `seal`.
    """
    files = sorted(_read_manifest(folder).items())
    for name, expected in files:
        _check_size(folder / name, expected["bytes"])
    mine = files[rank::world_size]
    with ThreadPoolExecutor(_NUM_THREADS, "checking") as pool:
        actual = list(pool.map(file_digest, [folder / name for name, _ in mine]))
    for (name, expected), digest in zip(mine, actual, strict=True):
        if digest != expected:
            raise DamagedError(f"{folder / name}: is not what was written (its checksum differs)")


def manifest_of_copy(folder: Path, changed: Mapping[str, bytes], names: Iterable[str]) -> bytes:
    """Return the manifest.json of a copy of a sealed folder in which some files are different.

    Args:
        folder: The sealed folder.
        changed: Name -> new content of the files that are different in the copy.
        names: The files of the copy that its manifest lists, if that of the folder does.

    Raises:
        DamagedError: The manifest of the folder is damaged.
    """
    listed = _read_manifest(folder)
    files = {name: listed[name] for name in names if name in listed}
    for name, content in changed.items():
        if name in files:
            digest = hashlib.sha256(content).hexdigest()
            files[name] = {"bytes": len(content), "sha256": digest}
    return _manifest_text(files).encode()


def sealed_names(folder: Path) -> Set[str]:
    """Return the names of the files that the manifest of a folder lists.

    Raises:
        DamagedError: The manifest is damaged.
    """
    return _read_manifest(folder).keys()


def is_sealed(folder: Path) -> bool:
    """Whether `folder` has a manifest. Folders of older versions may have none."""
    return os.path.isfile(folder / MANIFEST)  # False for names that no path can have


def file_digest(path: Path) -> FileDigest:
    """Return the size and sha256 of a file.

    Raises:
        DamagedError: The file cannot be read.
    """
    digest, size = hashlib.sha256(), 0
    with _damaged_if_unreadable(path), path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _check_size(path: Path, expected_bytes: int) -> None:
    with _damaged_if_unreadable(path):
        status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device would never end
        raise DamagedError(f"{path}: is not a regular file")
    size = status.st_size
    if size != expected_bytes:
        raise DamagedError(
            f"{path}: is not what was written ({size} bytes instead of {expected_bytes})"
        )


@contextmanager
def _damaged_if_unreadable(path: Path) -> Iterator[None]:
    """Raise a DamagedError that names `path` in place of an OSError."""
    try:
        yield
    except OSError as error:
        raise DamagedError(f"{path}: cannot be read ({error.strerror})") from error


def _read_manifest(folder: Path) -> dict[str, FileDigest]:
    """Read the digests by file name from a manifest.json, and check its own checksum."""
    path = folder / MANIFEST
    try:
        with _damaged_if_unreadable(path):
            text = read_bounded(path, MAX_JSON_BYTES).decode()
        files = parse_json(text)["files"]
        intact = text == _manifest_text(files) and all(map(_is_entry, files.items()))
    except (ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        raise DamagedError(f"{path}: is not what was written")
    return files


def _is_entry(item: tuple[str, Any]) -> bool:
    """Whether an entry has a name that a file can have, and a digest."""
    match item:
        case str(name), {"bytes": int(), "sha256": str()}:
            return "\0" not in name
    return False


def _manifest_text(files: Mapping[str, FileDigest]) -> str:
    """Return the text of a manifest: the digests of all files, and a checksum of these digests."""
    listed = json.dumps(files, indent=2, sort_keys=True)
    digest = hashlib.sha256(listed.encode()).hexdigest()
    return json.dumps({"sha256": digest, "files": files}, indent=2, sort_keys=True) + "\n"
