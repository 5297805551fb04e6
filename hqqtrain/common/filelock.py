"""A file that one process holds, and that tells other machines whether they share its disk."""

import fcntl
import os
import secrets
import socket
import time
from pathlib import Path
from typing import IO

from hqqtrain.common.errors import UserError
from hqqtrain.common.files import fsync_path

SEEN_WITHIN = 15.0
"""Seconds: NFS may keep what it knows of a folder for some."""


def take_lock(path: Path) -> IO[str] | None:
    """Holds `path` until the result is closed; None while another process has it.

    flock: the kernel frees it when the process dies, however it dies. A new token is written into
    the file, see `check_shared_lock`.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("a")
        except FileNotFoundError:  # another process has just removed the folder it had made
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


def lock_token(path: Path) -> str:
    """What the last process to take the lock has written there; empty without one."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def check_shared_lock(path: Path, token: str, key: str) -> None:
    """Raises UserError, naming `key`, where this machine does not see `token` in `path`."""
    end = time.monotonic() + SEEN_WITHIN
    while lock_token(path) != token:
        if time.monotonic() > end:
            raise UserError(
                f"{key}: {socket.gethostname()} does not see there what the first rank wrote into "
                f"{path.parent}. All nodes need one shared folder."
            )
        time.sleep(0.1)


def _is_current(file: IO[str], path: Path) -> bool:
    """Whether `path` still is the locked file: its last owner may just have removed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
