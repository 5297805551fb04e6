"""A folder that knows its own contents: one altered or missing byte is noticed before it is used.

Disks and copies do lose bytes, and most lost bytes of a checkpoint would load without a complaint.
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
"""Files that are read at a time: one thread hashes some 2 GB/s, disks give more."""

FileFacts = dict[str, Any]
"""Of a file: `bytes`, its size, and `sha256`."""


class DamagedError(Exception):
    """A file is missing, or not what it was when it was written: which one."""


def seal(folder: Path, known: Mapping[str, FileFacts] = MappingProxyType({})) -> None:
    """Writes the sizes and sha256 of all files of `folder` into its manifest.json.

    `known`: those of files that need not be read again, by name, as `file_digest` gives them.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    path = folder / MANIFEST
    files = {name: known.get(name) or file_digest(folder / name) for name in names}
    path.write_text(_text(files), encoding="utf-8")
    fsync_path(path)


def check_sealed(folder: Path, rank: int = 0, ranks: int = 1) -> None:
    """Reads every byte, of several `ranks` each its share of the files.

    Raises DamagedError unless all files, as far as sizes go, and those of the share in every byte,
    are as `seal` has found them.
    """
    files = sorted(_manifest(folder).items())
    for name, facts in files:
        _check_size(folder / name, facts)
    mine = files[rank::ranks]
    with ThreadPoolExecutor(_THREADS, "checking") as pool:
        found = list(pool.map(file_digest, [folder / name for name, _ in mine]))
    for (name, facts), there in zip(mine, found, strict=True):
        if there != facts:
            raise DamagedError(f"{folder / name}: is not what was written (its checksum differs)")


def is_sealed(folder: Path) -> bool:
    """Whether `folder` has a manifest; what an older version wrote may have none."""
    return (folder / MANIFEST).is_file()


def file_digest(path: Path) -> FileFacts:
    """{"bytes": size, "sha256": of the contents}. Raises DamagedError where it cannot be read."""
    digest, size = hashlib.sha256(), 0
    with _readable(path), path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _check_size(path: Path, facts: FileFacts) -> None:
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


def _manifest(folder: Path) -> dict[str, FileFacts]:
    path = folder / MANIFEST
    try:
        with _readable(path):
            text = path.read_bytes().decode()
        files = json.loads(text)["files"]
        intact = text == _text(files)  # which holds a checksum of itself
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise DamagedError(f"{path}: is not what was written")
    return files


def _text(files: Mapping[str, FileFacts]) -> str:
    listed = json.dumps(files, indent=2, sort_keys=True)
    digest = hashlib.sha256(listed.encode()).hexdigest()
    return json.dumps({"sha256": digest, "files": files}, indent=2, sort_keys=True) + "\n"
