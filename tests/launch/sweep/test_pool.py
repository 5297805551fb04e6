"""Job processes: their exit codes, their output, and the signals that are forwarded to them."""

import os
import signal
import sys
import time

import psutil
import pytest

from hqqtrain.launch.sweep.pool import FORWARDED_SIGNALS, ProcessPool

WAITS = """
import signal, sys
number = signal.Signals[sys.argv[1]]
signal.signal(number, lambda *_: sys.exit(7))
print("ready", flush=True)
signal.pause()
"""


def python(program: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", program, *arguments]


def test_every_process_has_its_own_exit_code_and_output(tmp_path):
    with ProcessPool() as pool:
        for code in (0, 3):
            log = tmp_path / f"{code}.log"
            program = f"import os, sys; print(os.environ['X']); sys.exit({code})"
            pool.start(code, python(program), {**os.environ, "X": f"job {code}"}, log)
        assert sorted(pool.wait() for _ in range(2)) == [(0, 0), (3, 3)]
    assert (tmp_path / "3.log").read_text() == "job 3\n"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"])
def test_a_signal_is_forwarded_to_all_running_processes(tmp_path, name):
    with ProcessPool() as pool:
        for key in "ab":
            pool.start(key, python(WAITS, name), os.environ, tmp_path / key)
        while not all((tmp_path / key).read_text() == "ready\n" for key in "ab"):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.Signals[name])
        assert pool.received_signal == signal.Signals[name]
        assert sorted(pool.wait() for _ in range(2)) == [("a", 7), ("b", 7)]


def test_a_process_killed_by_a_signal_has_a_negative_exit_code(tmp_path):
    with ProcessPool() as pool:
        pool.start("a", python("import signal; signal.pause()"), os.environ, tmp_path / "a")
        os.kill(os.getpid(), signal.SIGUSR1)
        assert pool.wait() == ("a", -signal.SIGUSR1)


def test_handlers_are_restored_and_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        handlers = [signal.getsignal(number) for number in FORWARDED_SIGNALS]
        with ProcessPool():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != handlers[1]
        assert [signal.getsignal(number) for number in FORWARDED_SIGNALS] == handlers
    finally:
        signal.signal(signal.SIGHUP, before)


def _fail_with_one_running(log) -> None:
    with ProcessPool() as pool:
        pool.start("a", python("import time; time.sleep(60)"), os.environ, log)
        raise RuntimeError("a defect")


def test_an_error_leaves_no_process_behind(tmp_path):
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="a defect"):
        _fail_with_one_running(tmp_path / "a")
    assert time.monotonic() - began < 30
    left = (" ".join(child.cmdline()) for child in psutil.Process().children())
    assert not any("time.sleep(60)" in command for command in left)
