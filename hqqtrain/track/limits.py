"""A timeout for calls that have none: a process that hangs must not block a finished run."""

import threading
from collections.abc import Callable

import psutil


def within(seconds: float, call: Callable[[], None], helpers: str) -> None:
    """Run `call` in a thread, with a timeout. An exception of `call` is raised here.

    After the timeout, child processes are killed if their names start with `helpers`. Otherwise
    handlers at the end of the program would wait for them.

    Args:
        seconds: the timeout.
        call: the function to run.
        helpers: prefix of the names of child processes that `call` waits for.

    Raises:
        TimeoutError: `call` did not return within `seconds`.
    """
    failures: list[Exception] = []

    def run() -> None:
        try:
            call()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        for child in psutil.Process().children(recursive=True):
            if child.name().startswith(helpers):
                child.kill()
        raise TimeoutError(f"{helpers} did not end within {seconds:.0f} s")
    if failures:
        raise failures[0]
