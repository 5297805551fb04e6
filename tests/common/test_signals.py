"""The first signal is recorded; a repetition soon after it is the same request, a later one kills.

Every test uses a process of its own, because listening replaces the handlers of the process.
"""

import os
import signal
import time
from collections.abc import Callable

import pytest

from hqqtrain.common import signals


def _in_child(work: Callable[[], int]) -> int:
    """Return the exit code of `work` in a forked process that listens for signals."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            signals.listen_for_signals()
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _send(number: int) -> None:
    os.kill(os.getpid(), number)
    deadline = time.monotonic() + 5
    while not signals.received_signal() and time.monotonic() < deadline:
        time.sleep(0.001)


def test_nothing_is_recorded_without_a_signal():
    assert _in_child(lambda: 7 if signals.received_signal() == "" else 8) == 7


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_is_recorded_by_name_and_the_process_continues(name):
    def work() -> int:
        _send(signal.Signals[name])
        return 7 if signals.received_signal() == name else 8

    assert _in_child(work) == 7


def test_a_second_signal_soon_after_is_the_same_request():
    def work() -> int:
        _send(signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        return 7 if signals.received_signal() == "SIGUSR1" else 8

    assert _in_child(work) == 7


def test_a_second_ctrl_c_ends_the_process_at_once(capfd):
    def work() -> int:
        _send(signal.SIGINT)
        time.sleep(2 * signals.CTRL_C_SECONDS)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        return 7

    assert _in_child(work) == 130
    assert capfd.readouterr().err.count("press Ctrl-C again") == 1


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_is_acknowledged_while_the_main_thread_is_busy(name, capfd):
    def work() -> int:
        os.kill(os.getpid(), signal.Signals[name])
        time.sleep(0.2)  # as long as a step may take
        return 7

    assert _in_child(work) == 7
    error = capfd.readouterr().err
    assert error.count(f"hqqtrain: {name} was received: stopping after this step") == 1


def test_ranks_of_a_launcher_take_a_forwarded_ctrl_c_for_the_same(monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")

    def work() -> int:
        _send(signal.SIGINT)
        time.sleep(2 * signals.CTRL_C_SECONDS)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        return 7

    assert _in_child(work) == 7
    assert capfd.readouterr().err == ""  # only rank 0 says what to do


@pytest.mark.parametrize(("world_size", "is_recorded"), [("1", False), ("2", True)])
def test_an_ignored_signal_stays_ignored_without_a_launcher(monkeypatch, world_size, is_recorded):
    monkeypatch.setenv("WORLD_SIZE", world_size)

    def work() -> int:
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.1)
        return 7 if bool(signals.received_signal()) == is_recorded else 8

    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert _in_child(work) == 7
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_a_later_signal_ends_the_process_at_once(monkeypatch):
    monkeypatch.setattr(signals, "SAME_SIGNAL_SECONDS", 0.0)

    def work() -> int:
        _send(signal.SIGUSR1)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        return 7

    assert _in_child(work) == 1


def test_other_signals_with_a_handler_are_not_recorded():
    def work() -> int:
        signal.signal(signal.SIGUSR2, lambda *_: None)
        os.kill(os.getpid(), signal.SIGUSR2)
        time.sleep(0.05)
        return 7 if signals.received_signal() == "" else 8

    assert _in_child(work) == 7
