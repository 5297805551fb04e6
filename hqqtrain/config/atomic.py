"""Write files that a reader sees either complete or not at all, even if the writer is killed.

This module is in the lowest layer and uses only the standard library: every layer above writes
files, and submitting a job must not wait the seconds that importing torch takes.
"""

import os
from pathlib import Path


def atomic_write(path: Path, content: str | bytes) -> Path:
    """Write `content` to `path` atomically, text as UTF-8, and return `path`.

    The content goes to a temporary file in the same folder, is flushed to disk, and is then
    renamed, so readers see either the old content or the new one.
    """
    path = Path(path)
    temporary = partial_of(path)
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)
    return path


def partial_of(path: Path) -> Path:
    """Return the temporary name that `path` has while it is being written."""
    return path.with_name(f".{path.name}.partial")


def sync(path: Path) -> None:
    """Flush a file's contents, or a folder's list of names, to disk with `fsync`."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
