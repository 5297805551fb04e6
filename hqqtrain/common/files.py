"""Write files and folders so that each is complete or absent, even if the process is killed."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def atomic_write(path: Path, content: str | bytes) -> Path:
    """Write `content` to `path` atomically, text as UTF-8, and return `path`.

    The content goes to a temporary file in the same folder, is flushed to disk, and is then
    renamed, so readers see either the old content or the new one.
    """
    path = Path(path)
    temporary = temporary_path(path)
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    fsync_path(temporary)
    temporary.replace(path)
    fsync_path(path.parent)
    return path


def temporary_path(path: Path) -> Path:
    """Return the temporary name that `path` has while it is being written."""
    return path.with_name(f".{path.name}.partial")


def fsync_path(path: Path) -> None:
    """Flush a file's contents, or a folder's list of names, to disk with `fsync`."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `path` that replaces `path` on success.

    On an exception the temporary folder is removed and `path` stays as it was. A process that was
    killed earlier may have left folders: its old folder is restored if `path` is missing, and the
    others are removed. So only one process may write to `path` at a time.
    """
    path = Path(path)
    temporary, old = temporary_path(path), path.with_name(f".{path.name}.old")
    path.parent.mkdir(parents=True, exist_ok=True)
    _recover(path, old)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        _sync_tree(temporary)
        if path.exists():  # a folder that is not empty cannot be replaced by a single rename
            path.rename(old)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        _recover(path, old)
        raise
    fsync_path(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def atomic_write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON.

    Raises:
        ValueError: `value` contains NaN or infinity, which JSON does not have.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    atomic_write(path, text + "\n")


def without_nonfinite(value: Any) -> Any:
    """Return a copy of a JSON value in which NaN and infinity are None."""
    if isinstance(value, dict):
        return {k: without_nonfinite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_nonfinite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def stat_digest(path: Path) -> str:
    """Return the sha256, in hex, of the sizes and modification times of the files at `path`.

    `path` is a file or a folder. For a folder, the names of its files are hashed, too. The contents
    are not read, because they may be large.
    """
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    stats = [(str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def _recover(path: Path, old: Path) -> None:
    """Restore the old folder if the swap stopped between its two renames; otherwise remove it."""
    if old.exists() and not path.exists():
        old.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    """Flush a folder to disk, and apply the umask to its files, which safetensors makes private."""
    # The new folder shows the umask. The umask itself can only be read by changing it.
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
        fsync_path(path)
    fsync_path(folder)
