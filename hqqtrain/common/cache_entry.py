"""Folders of a cache that several runs, and maybe several users, share.

An entry is a folder that is complete or absent. A complete one is only read, so a user need not be
allowed to write to it. A run that finds none locks its name, and writes it.
"""

import errno
import os
import stat
from pathlib import Path
from typing import IO

from hqqtrain.common.digest import cache_folder
from hqqtrain.common.errors import UserError
from hqqtrain.common.filelock import try_lock


def is_complete_entry(folder: Path, marker: str, key: str) -> bool:
    """Whether the entry in `folder` exists and may be trusted.

    Args:
        folder: The folder of the entry, directly below that of the cache.
        marker: The name of a file that every complete entry has.
        key: The config key of the cache, for messages.

    Raises:
        UserError: The entry is a link; or everybody may write to the cache, and the entry belongs
            neither to this user nor to the owner of the cache.
    """
    if folder.is_symlink():
        raise UserError(f"{folder}: is a symbolic link, and no entry of the cache is; remove it.")
    if not (folder / marker).is_file():
        return False
    cache, owner = folder.parent.stat(), folder.stat().st_uid
    if cache.st_mode & stat.S_IWOTH and owner not in (os.getuid(), 0, cache.st_uid):
        raise UserError(
            f"{key}={folder.parent}: everybody may write to it, and {folder.name} "
            f"belongs to another user (uid {owner}). Choose another folder, or have the owner of "
            "the cache run chmod o-w on it."
        )
    return True


def lock_path(folder: Path) -> Path:
    """Return the file that is locked while the entry in `folder` is written."""
    return folder.with_name(f".{folder.name}.lock")


def lock_entry(path: Path, where: str) -> IO[str] | None:
    """Return the locked file; None if another run has locked it.

    Args:
        path: The file, from `lock_path`.
        where: The config key of the cache and its value, for the message.

    Raises:
        UserError: The file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path.parent))
        return try_lock(path)
    except OSError as error:
        raise UserError(f"{where}: cannot be written to ({error}); choose another.") from error


def default_cache_root(name: str, run_root: Path) -> Path:
    """Return the folder of a cache that no key names: in the user's cache, if it can be written to.

    Data may be private, and the folder of all runs may not be. It is the next best.

    Args:
        name: What the cache contains, such as `tokens`.
        run_root: The folder of all runs.
    """
    try:
        root = cache_folder() / name
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (OSError, RuntimeError):  # RuntimeError: this user has no home
        return run_root / name
    return root if os.access(root, os.W_OK) else run_root / name
