"""A call with a timeout, and a background writer whose errors are not lost."""

import threading
import time

import psutil
import pytest

from hqqtrain.common.threads import BackgroundWriter, call_with_timeout


def test_a_call_that_returns_in_time_has_run():
    done = []
    call_with_timeout(5.0, lambda: done.append(threading.current_thread()), "none-")
    assert done
    assert done[0] is not threading.current_thread()


def test_the_error_of_the_call_is_raised_here():
    def fail() -> None:
        raise ZeroDivisionError("of the call")

    with pytest.raises(ZeroDivisionError, match="of the call"):
        call_with_timeout(5.0, fail, "none-")


def test_after_the_timeout_only_children_with_the_prefix_are_killed(monkeypatch):
    class Child:
        def __init__(self, name: str) -> None:
            self._name, self.is_killed = name, False

        def name(self) -> str:
            return self._name

        def kill(self) -> None:
            self.is_killed = True

    children = [Child("wandb-core"), Child("python"), Child("my-wandb-core")]
    monkeypatch.setattr(psutil.Process, "children", lambda self, recursive: children)
    release, began = threading.Event(), time.monotonic()
    with pytest.raises(TimeoutError, match=r"^wandb- did not end within 0 s$"):
        call_with_timeout(0.01, release.wait, "wandb-")
    assert time.monotonic() - began < 2
    assert [child.is_killed for child in children] == [True, False, False]
    release.set()


def test_a_job_runs_while_the_caller_continues():
    writer, may_end, done = BackgroundWriter("writing"), threading.Event(), []
    writer.start(lambda: done.append(may_end.wait(5)))
    assert done == []
    may_end.set()
    writer.wait()
    assert done == [True]
    writer.close()


def test_the_error_of_a_job_is_raised_once_by_wait_and_the_writer_stays_usable():
    def fail() -> None:
        raise OSError(28, "No space left on device")

    writer, done = BackgroundWriter("writing"), []
    writer.wait()  # without a job there is nothing to wait for
    writer.start(fail)
    with pytest.raises(OSError, match="No space left"):
        writer.wait()
    writer.wait()
    writer.start(lambda: done.append(1))
    writer.close()
    assert done == [1]


def test_two_jobs_at_a_time_are_a_mistake_of_the_caller():
    writer = BackgroundWriter("writing")
    writer.start(lambda: None)
    with pytest.raises(AssertionError):
        writer.start(lambda: None)
    writer.close()
