"""The lock of a sweep's folder, which says whether the sweep or one of its jobs lives."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hqqtrain.common.files import open_for_append
from hqqtrain.launch.sweep.sweep import Sweep

LOCK = ".lock"
"""File name of the lock."""


@contextmanager
def hold_lock(sweep: Sweep, on_wait: Callable[[], None]) -> Iterator[int]:
    """Hold an exclusive lock on the sweep's folder, waiting until it is free.

    Jobs inherit the lock's file descriptor, so the lock stays held as long as any job runs, even
    if the process of the sweep itself is gone.

    Args:
        sweep: the sweep whose folder is locked.
        on_wait: called once if another attempt holds the lock.

    Yields:
        The file descriptor of the lock.
    """
    with open(open_for_append(sweep.folder / LOCK), "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def is_locked(sweep: Sweep) -> bool:
    """Whether a process holds the lock of `sweep`, this one included."""
    try:
        fd = os.open(sweep.folder / LOCK, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass  # there is no lock yet, or it cannot be read
    return False
