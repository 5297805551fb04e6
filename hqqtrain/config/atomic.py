"""Files that a reader sees complete or not at all, whatever kills the process in between.

Here, on the lowest floor and with the standard library alone, because every floor above writes
some, and submitting a job may not take the seconds that importing torch does.
"""

import os
from pathlib import Path


def atomic_write(path: Path, content: str | bytes) -> Path:
    """Writes `content`, text as UTF-8, to `path`, and returns `path`.

    Written beside it, forced to the disk, renamed: readers see the old content or the new.
    """
    path = Path(path)
    temporary = partial_of(path)
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)
    return path


def partial_of(path: Path) -> Path:
    """Where `path` is written before it takes its place."""
    return path.with_name(f".{path.name}.partial")


def sync(path: Path) -> None:
    """Make a file's contents, or a folder's list of names, survive a crash of the machine."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
