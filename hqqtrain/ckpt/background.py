"""Write files on a background thread while training continues."""

import concurrent.futures as futures
from collections.abc import Callable


class Background:
    """Runs one job at a time on its own thread; `wait` raises the error of a failed job."""

    def __init__(self, name: str) -> None:
        self._pool = futures.ThreadPoolExecutor(1, name)
        self._job: futures.Future[None] | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Start `job`. The caller must have waited for the previous one."""
        assert self._job is None
        self._job = self._pool.submit(job)

    def wait(self) -> None:
        """Wait for the current job, if there is one, and raise its error."""
        job, self._job = self._job, None
        if job:
            job.result()

    def close(self) -> None:
        """Stop the thread after its current job."""
        self._pool.shutdown(wait=True)
