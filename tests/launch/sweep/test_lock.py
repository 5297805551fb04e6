"""The lock of a sweep's folder: one attempt at a time, and whether one lives."""

import fcntl
import os

import pytest
from sweeps import make_sweep

from hqqtrain.launch.sweep import lock
from hqqtrain.launch.sweep.lock import hold_lock, is_locked


def test_the_lock_waits_for_the_jobs_of_an_earlier_attempt(tmp_path, monkeypatch):
    sweep = make_sweep(tmp_path, "a", "b")
    original, calls, waits = fcntl.flock, [], []

    def busy_once(file, operation: int) -> None:
        calls.append(operation)
        if len(calls) == 1:
            raise BlockingIOError
        original(file, operation)

    monkeypatch.setattr(lock.fcntl, "flock", busy_once)
    with hold_lock(sweep, lambda: waits.append(1)) as handle:
        assert waits == [1]
        assert calls == [fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_EX]
        with (sweep.folder / ".lock").open() as other, pytest.raises(BlockingIOError):
            original(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.fstat(handle)


def test_a_sweep_is_locked_while_one_process_has_the_handle(tmp_path):
    sweep = make_sweep(tmp_path, "a", "b")
    assert not is_locked(sweep)  # there is no lock yet
    with hold_lock(sweep, lambda: None) as handle:
        assert is_locked(sweep)
        inherited = os.dup(handle)
    assert is_locked(sweep)
    os.close(inherited)
    assert not is_locked(sweep)


def test_a_pipe_in_place_of_the_lock_is_not_waited_for(tmp_path):
    sweep = make_sweep(tmp_path, "a", "b")
    sweep.folder.mkdir(parents=True, exist_ok=True)
    os.mkfifo(sweep.folder / lock.LOCK)
    assert not is_locked(sweep)
