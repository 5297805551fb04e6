"""One attempt at a sweep at a time, also where the jobs of one that was killed still run."""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hqqtrain.sweep.sweep import Sweep


@contextmanager
def hold(sweep: Sweep, on_wait: Callable[[], None]) -> Iterator[int]:
    """Holds the sweep's folder, after waiting for whoever has it; yields the lock's handle.

    Jobs inherit the handle: as long as one runs the lock is held, even where we are gone.
    `on_wait` is called where there is something to wait for.
    """
    with (sweep.folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()
