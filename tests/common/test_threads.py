"""A call with a timeout, and a background job whose errors are not lost."""

import sys
import threading
import time

import psutil
import pytest

from hqqtrain.common.threads import BackgroundExecutor, call_with_timeout, usable_cores


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


def test_an_exit_of_the_call_is_not_taken_for_success():
    with pytest.raises(SystemExit, match="of the call"):
        call_with_timeout(5.0, lambda: sys.exit("of the call"), "none-")


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
    with pytest.raises(TimeoutError, match=r"^the processes wandb-\* did not end within 0 s$"):
        call_with_timeout(0.01, release.wait, "wandb-")
    assert time.monotonic() - began < 2
    assert [child.is_killed for child in children] == [True, False, False]
    release.set()


def test_a_job_runs_while_the_caller_continues():
    executor, may_end, done = BackgroundExecutor("jobs"), threading.Event(), []
    executor.start(lambda: done.append(may_end.wait(5)))
    assert done == []
    may_end.set()
    executor.wait()
    assert done == [True]
    executor.close()


def test_the_error_of_a_job_is_raised_once_by_wait_and_the_executor_stays_usable():
    def fail() -> None:
        raise OSError(28, "No space left on device")

    executor, done = BackgroundExecutor("jobs"), []
    executor.wait()  # without a job there is nothing to wait for
    executor.start(fail)
    with pytest.raises(OSError, match="No space left"):
        executor.wait()
    executor.wait()
    executor.start(lambda: done.append(1))
    executor.close()
    assert done == [1]


def test_two_jobs_at_a_time_are_a_mistake_of_the_caller():
    executor = BackgroundExecutor("jobs")
    executor.start(lambda: None)
    with pytest.raises(AssertionError):
        executor.start(lambda: None)
    executor.close()


def test_the_cores_that_a_scheduler_leaves(monkeypatch):
    assert 1 <= usable_cores() <= psutil.cpu_count()
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda _: [3], raising=False)
    assert usable_cores() == 1
    monkeypatch.delattr(psutil.Process, "cpu_affinity")
    assert usable_cores() == psutil.cpu_count()
