"""A lock file that one process holds, and by which other machines verify a shared file system."""

import fcntl
import os
import secrets
import socket
import time
from pathlib import Path
from typing import IO

from hqqtrain.config import UserError
from hqqtrain.config.atomic import sync

SEEN_WITHIN = 15.0
"""Seconds to wait for another machine's file: NFS clients cache folders for some seconds."""


def take_lock(path: Path) -> IO[str] | None:
    """Lock `path` until the returned file is closed; return None if another process holds it.

    The lock is an `flock`, which the kernel releases whenever the process dies. A new random token
    is written into the file for `check_seen`.
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
            sync(path)
            return file
        file.close()


def token_of(path: Path) -> str:
    """Return the token of the last process that took the lock, or an empty string."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def check_seen(path: Path, token: str, key: str) -> None:
    """Check that this machine sees `token` in `path`, that is, shares the file system.

    Args:
        path: The lock file.
        token: The token that rank 0 has written.
        key: The config key and value to name in the message.

    Raises:
        UserError: the token does not appear within `SEEN_WITHIN` seconds.
    """
    end = time.monotonic() + SEEN_WITHIN
    while token_of(path) != token:
        if time.monotonic() > end:
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
