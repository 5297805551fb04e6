"""Writing while the training goes on: one thread, one job at a time."""

import concurrent.futures as futures
from collections.abc import Callable


class BackgroundWriter:
    """Runs one job at a time on a thread of its own.

    An error of a job is kept for `wait`.
    """

    def __init__(self, name: str) -> None:
        self._pool = futures.ThreadPoolExecutor(1, name)
        self._job: futures.Future[None] | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Begins `job`. The one before it must have been waited for."""
        assert self._job is None
        self._job = self._pool.submit(job)

    def wait(self) -> None:
        """Until the job is done, if there is one. Raises what it has raised."""
        job, self._job = self._job, None
        if job:
            job.result()

    def close(self) -> None:
        """Ends the thread, after its job."""
        self._pool.shutdown(wait=True)
