"""A lock that allows one attempt at a sweep at a time.

The jobs of a killed attempt may still run, so the lock outlives the process that took it.
"""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hqqtrain.sweep.sweep import Sweep


@contextmanager
def hold(sweep: Sweep, on_wait: Callable[[], None]) -> Iterator[int]:
    """Hold an exclusive lock on the sweep's folder, waiting until it is free.

    Jobs inherit the lock's file descriptor, so the lock stays held as long as any job runs, even
    if the process of the sweep itself is gone.

    Args:
        sweep: the sweep whose folder is locked.
        on_wait: called once if another attempt holds the lock.

    Yields:
        The file descriptor of the lock.
    """
    with (sweep.folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()
