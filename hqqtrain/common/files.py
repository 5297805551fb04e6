"""Write files and folders so that each is complete or absent, even if the process is killed.

Other users may be able to write to a shared folder. A link that one of them has planted under a
name that we write to must not redirect the write, so no link is followed when a file is opened.
"""

import errno
import hashlib
import json
import math
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hqqtrain.common.errors import UserError


def atomic_write(path: Path, content: str | bytes) -> Path:
    """Write `content` to `path` atomically, text as UTF-8, and return `path`.

    The content goes to a temporary file in the same folder, is flushed to disk, and is then
    renamed, so readers see either the old content or the new one.
    """
    path = Path(path)
    temporary = temporary_path(path)
    remove(temporary)  # left by a killed process, or a planted link
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    with open(fd, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(fd)
    temporary.replace(path)
    fsync_path(path.parent)
    return path


def open_for_append(path: Path) -> int:
    """Open or create the file at `path` for appending and return its descriptor.

    Raises:
        OSError: `path` is a link, has a second name, or is no regular file, so that writing would
            change a file elsewhere.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(path, flags, 0o666)
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(fd)
        raise OSError(errno.ELOOP, "is a link or no regular file", str(path))
    return fd


def make_folder(folder: Path) -> None:
    """Create `folder` if it is missing.

    Raises:
        OSError: `folder` is a link, so that its files would be written elsewhere, or no folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if folder.is_symlink():
        raise OSError(errno.ELOOP, "is a symbolic link", str(folder))


def check_owner(folder: Path, where: str) -> None:
    """Check that nobody else has prepared `folder` for us to write into; it may be missing.

    A folder of another user that everybody may write to is refused, because anybody can exchange
    its files while we use them. Members of a group may share a folder.

    Args:
        folder: The folder.
        where: The key and its value, with which the message begins.

    Raises:
        UserError: The folder belongs to somebody else, and all users may write to it.
    """
    try:
        status = folder.stat()
    except OSError:  # reported with a better message by the caller that needs the folder
        return
    if status.st_uid not in (os.getuid(), 0) and status.st_mode & stat.S_IWOTH:
        raise UserError(
            f"{where}: {folder} belongs to another user (uid {status.st_uid}) and everybody may "
            f"write to it; choose another folder, or have its owner run chmod o-w {folder}."
        )


def remove(path: Path) -> None:
    """Remove a file, a folder or a link, but not the target of a link; ignore a missing path."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


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
def atomic_directory(
    path: Path, max_modes: Mapping[str, int] = MappingProxyType({})
) -> Iterator[Path]:
    """Yield a temporary folder next to `path` that replaces `path` on success.

    On an exception the temporary folder is removed and `path` stays as it was. A process that was
    killed earlier may have left folders: its old folder is restored if `path` is missing, and the
    others are removed. So only one process may write to `path` at a time.

    Args:
        path: The folder to create or replace.
        max_modes: File name -> the widest permissions that this file may get, because it is a copy
            of a file with these permissions. All other files get those of the umask.
    """
    path = Path(path)
    temporary, old = temporary_path(path), path.with_name(f".{path.name}.old")
    path.parent.mkdir(parents=True, exist_ok=True)
    _recover(path, old)
    remove(temporary)
    temporary.mkdir()  # fails if somebody has planted a link under this name meanwhile
    try:
        yield temporary
        _sync_tree(temporary, max_modes)
        if path.exists() or path.is_symlink():
            # A folder that is not empty cannot be replaced by a single rename.
            path.rename(old)
        temporary.rename(path)
    except BaseException:
        remove(temporary)
        _recover(path, old)
        raise
    fsync_path(path.parent)
    remove(old)


def atomic_write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON. Names of files that are not UTF-8 are escaped.

    Raises:
        ValueError: `value` contains NaN or infinity, which JSON does not have.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    # Half of a surrogate pair becomes `\\udcff`, which is its escape sequence in JSON, too.
    atomic_write(path, f"{text}\n".encode(errors="backslashreplace"))


def without_nonfinite(value: Any) -> Any:
    """Return a copy of a JSON value in which NaN and infinity are None."""
    if isinstance(value, dict):
        return {k: without_nonfinite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_nonfinite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def stat_digest(path: Path) -> str:
    """Return the sha256, in hex, of the sizes and modification times of the files at `path`.

    Runs of the first release have recorded their inputs in this way. `hqqtrain/common/digest.py`
    identifies files by their contents.
    """
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    stats = [(str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def _recover(path: Path, old: Path) -> None:
    """Restore the old folder if the swap stopped between its two renames; otherwise remove it."""
    if old.is_dir() and not old.is_symlink() and not path.exists():
        old.rename(path)
    remove(old)


def _sync_tree(folder: Path, max_modes: Mapping[str, int]) -> None:
    """Flush a folder to disk, and apply the umask to its files, which safetensors makes private."""
    # The new folder shows the umask. The umask itself can only be read by changing it.
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode & max_modes.get(str(path.relative_to(folder)), mode))
        fsync_path(path)
    fsync_path(folder)
