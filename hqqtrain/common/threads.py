"""Calls on a thread of their own: with a timeout, or in the background while training continues."""

import concurrent.futures as futures
import threading
from collections.abc import Callable

import psutil


def call_with_timeout(seconds: float, call: Callable[[], None], child_process_prefix: str) -> None:
    """Run `call` in a thread, with a timeout. Whatever `call` raises is raised here.

    After the timeout, child processes whose names start with `child_process_prefix` are killed.
    Otherwise handlers at the end of the program would wait for them.

    Args:
        seconds: the timeout.
        call: the function to run.
        child_process_prefix: prefix of the names of child processes that `call` waits for.

    Raises:
        TimeoutError: `call` did not return within `seconds`.
    """
    errors: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:  # also SystemExit, which would end the thread silently
            errors.append(error)

    # A daemon, because the interpreter would wait for any other thread at its end.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        for child in psutil.Process().children(recursive=True):
            if child.name().startswith(child_process_prefix):
                child.kill()
        raise TimeoutError(
            f"the processes {child_process_prefix}* did not end within {seconds:.0f} s"
        )
    if errors:
        raise errors[0]


def usable_cores() -> int:
    """Return the number of cores that this process may use, which a scheduler may limit."""
    process = psutil.Process()
    has_affinity = hasattr(process, "cpu_affinity")  # not on macOS
    return len(process.cpu_affinity()) if has_affinity else psutil.cpu_count() or 1


class BackgroundExecutor:
    """Runs one job at a time on its own thread; `wait` raises the error of a failed job."""

    def __init__(self, thread_name: str) -> None:
        self._pool = futures.ThreadPoolExecutor(1, thread_name)
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
        """Wait for the current job, then stop the thread. The error of the job is not raised."""
        self._pool.shutdown(wait=True)
