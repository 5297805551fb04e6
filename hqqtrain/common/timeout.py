"""A limit for calls that know none: a process that hangs must not hold a run that is done."""

import threading
from collections.abc import Callable

import psutil


def call_with_timeout(seconds: float, call: Callable[[], None], helpers: str) -> None:
    """`call()` in a thread; what it raises is raised here.

    Raises TimeoutError after `seconds`, and kills those processes under us whose name starts with
    `helpers`: others that wait for them, as at the end of the program, wait no more.
    """
    failures: list[Exception] = []

    def work() -> None:
        try:
            call()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        for child in psutil.Process().children(recursive=True):
            if child.name().startswith(helpers):
                child.kill()
        raise TimeoutError(f"{helpers} did not end within {seconds:.0f} s")
    if failures:
        raise failures[0]
