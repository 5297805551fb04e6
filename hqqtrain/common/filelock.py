"""A lock file that one process holds. Other machines read it to verify a shared file system."""

import fcntl
import os
import secrets
import socket
import time
from pathlib import Path
from typing import IO

from hqqtrain.common.errors import UserError
from hqqtrain.common.files import fsync_path

VISIBILITY_TIMEOUT = 15.0
"""Seconds to wait for another machine's file: NFS clients cache folders for some seconds."""


def try_lock(path: Path) -> IO[str] | None:
    """Lock `path` until the returned file is closed; return None if another process holds it.

    The lock is an `flock`, which the kernel releases whenever the process dies. A new random token
    is written into the file for `check_shared_lock`.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("a")
        except FileNotFoundError:  # another process has just removed its empty run directory
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        if _is_current(file, path):
            file.truncate(0)
            file.write(secrets.token_hex(8))
            file.flush()
            fsync_path(path)
            return file
        file.close()


def read_lock_token(path: Path) -> str:
    """Return the token of the last process that took the lock, or an empty string."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):  # ValueError: bytes that are no text, so no token of ours
        return ""


def check_shared_lock(path: Path, token: str, key: str) -> None:
    """Check that this machine sees `token` in `path`, that is, shares the file system.

    Args:
        path: The lock file.
        token: The token that rank 0 has written.
        key: The config key and value to name in the message.

    Raises:
        UserError: the token does not appear within `VISIBILITY_TIMEOUT` seconds.
    """
    deadline = time.monotonic() + VISIBILITY_TIMEOUT
    while read_lock_token(path) != token:
        if time.monotonic() > deadline:
            raise UserError(
                f"{key}: {socket.gethostname()} does not see the file that rank 0 wrote to "
                f"{path.parent}. All nodes need one shared folder."
            )
        time.sleep(0.1)


def _is_current(file: IO[str], path: Path) -> bool:
    """Whether `path` is still the locked file; its last owner may just have removed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
