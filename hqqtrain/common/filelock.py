"""A lock file that one process holds. Other machines read it to verify a shared file system."""

import fcntl
import hashlib
import os
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from hqqtrain.common.errors import UserError
from hqqtrain.common.files import fsync_path, open_for_append
from hqqtrain.common.reading import read_bounded

VISIBILITY_TIMEOUT = 15.0
"""Seconds to wait for another machine's file: NFS clients cache folders for some seconds."""

_MAX_TOKEN_BYTES = 1024
"""Bytes; a file with more is not a lock of ours."""


def try_lock(path: Path) -> IO[str] | None:
    """Lock `path` until the returned file is closed; return None if another process holds it.

    The lock is an `flock`, which the kernel releases whenever the process dies. A new random token
    is written into the file for `check_shared_lock`.

    Raises:
        OSError: The file cannot be written to, or is a link.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = _open_lock(path)
        except FileNotFoundError:  # another process has just removed its empty run directory
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        if _is_current(file, path):
            if file.writable():
                file.truncate(0)
                file.write(secrets.token_hex(8))
                file.flush()
                fsync_path(path)
            return file
        file.close()


def read_lock_token(path: Path) -> str:
    """Return the token of the last process that took the lock, or an empty string."""
    try:
        return read_bounded(path, _MAX_TOKEN_BYTES).decode()
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
    if not becomes_true(lambda: read_lock_token(path) == token):
        raise UserError(
            f"{key}: {socket.gethostname()} does not see the file that rank 0 wrote to "
            f"{path.parent}. All nodes need one shared folder."
        )


def check_shared_file(path: Path, sha256: str, key: str) -> None:
    """Check that this machine sees the file at `path` with the content that rank 0 sees.

    Args:
        path: The file.
        sha256: The digest of its content on rank 0, in hex.
        key: The config key and value to name in the message.

    Raises:
        UserError: the content does not appear within `VISIBILITY_TIMEOUT` seconds.
    """

    def is_same() -> bool:
        try:
            return hashlib.sha256(path.read_bytes()).hexdigest() == sha256
        except OSError:
            return False

    if not becomes_true(is_same):
        raise UserError(
            f"{key}: {socket.gethostname()} does not see {path} as rank 0 does. All nodes need one "
            "shared folder."
        )


def becomes_true(condition: Callable[[], bool]) -> bool:
    """Wait for at most `VISIBILITY_TIMEOUT` seconds until `condition` is true; return whether."""
    deadline = time.monotonic() + VISIBILITY_TIMEOUT
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _open_lock(path: Path) -> IO[str]:
    """Open or create a lock file. That of another user can be locked, but not written to."""
    try:
        return open(open_for_append(path), "a", encoding="utf-8")
    except PermissionError:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        return open(os.open(path, flags), encoding="utf-8")


def _is_current(file: IO[str], path: Path) -> bool:
    """Whether `path` is still the locked file; its last owner may just have removed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
