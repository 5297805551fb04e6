"""A wish to stop: by signals, by a time limit, by slurm's."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from hqqtrain.config import PreemptedError, RunSection, signals
from hqqtrain.dist import ALONE
from hqqtrain.train.interrupt import SLOW_DISK, SPARE, Interrupt


@pytest.fixture(autouse=True)
def _signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("SLURM_JOB_END_TIME", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    signals.listen()
    yield
    signals.listen()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_a_signal_is_heard_where_ranks_meet(number: signal.Signals):
    asked = Interrupt(RunSection())
    assert not asked.reason
    asked.check(ALONE)
    send(number)
    for check in (lambda: asked.check(ALONE), asked.check_alone):
        with pytest.raises(PreemptedError, match=f"{number.name} was received"):
            check()


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    end = time.monotonic() + 10
    while not signals.received():  # by a thread
        assert time.monotonic() < end
        time.sleep(0.001)


BUSY = """
import hashlib, os, signal, sys, threading, time
from hqqtrain.config import signals
signals.listen()
pause = float(sys.argv[1])
def send():
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(pause)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=send).start()
hashlib.pbkdf2_hmac("sha256", b"", b"", 12_000_000)  # as a collective: no Python runs here
print(signals.received())
"""


@pytest.mark.parametrize(("pause", "code"), [("0.1", 0), ("2.5", 1)])
def test_a_second_signal_ends_it_at_once_but_not_the_same_by_another_way(pause: str, code: int):
    command = [sys.executable, "-c", BUSY, pause]
    done = subprocess.run(command, timeout=120, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "" if code else "SIGUSR1\n"), done.stderr


def test_a_time_limit_leaves_room_for_two_steps(monkeypatch: pytest.MonkeyPatch):
    began = psutil.Process().create_time()
    monkeypatch.setattr(time, "time", lambda: began + 3600 - SPARE - 50)
    asked = Interrupt(RunSection(time_limit="1:00:00"))
    asked.step_took(3.0)
    before = asked.reason
    asked.step_took(900.0)
    assert not before
    assert asked.reason
    with pytest.raises(PreemptedError, match=r"run\.time_limit=1:00:00"):
        asked.check(ALONE)
    asked.check_alone()  # a time limit is no signal: others would not know of it


def test_a_time_limit_leaves_room_for_checkpoints(monkeypatch: pytest.MonkeyPatch):
    began = psutil.Process().create_time()
    monkeypatch.setattr(time, "time", lambda: began + 3600 - SPARE - 50)
    afraid, asked = (Interrupt(RunSection(time_limit="1:00:00")) for _ in range(2))
    for each in (afraid, asked):
        each.expects(int(60 * SLOW_DISK))  # before any was written
    assert afraid.reason
    for each in (afraid, asked):
        each.write_took(10.0)
    assert afraid.reason, "it is stopping"
    assert not asked.reason
    asked.step_took(16.0)
    assert asked.reason


def test_all_ranks_hear_whose_wish_it_was():
    asked = Interrupt(RunSection())
    processes = SimpleNamespace(gather=lambda mine: [mine, "SIGTERM was received", mine])
    with pytest.raises(PreemptedError, match=r"^rank 1: SIGTERM was received$"):
        asked.stop(processes)


def test_a_signal_after_a_time_limit_is_the_first(monkeypatch: pytest.MonkeyPatch):
    began = psutil.Process().create_time()
    monkeypatch.setattr(time, "time", lambda: began + 3600)
    asked = Interrupt(RunSection(time_limit="1:00:00"))
    assert "nearly reached" in asked.reason
    send(signal.SIGUSR1)
    assert asked.reason == "SIGUSR1 was received"


def test_slurm_says_when_a_job_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 2))
    assert Interrupt(RunSection()).reason
    assert not Interrupt(RunSection(time_limit="9:00:00")).reason  # the user's word counts
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    squeue = tmp_path / "squeue"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not Interrupt(RunSection()).reason  # nobody to ask
    for said, is_near in ((datetime.now(), True), (datetime.now() + timedelta(hours=1), False)):
        squeue.write_text(f"#!/bin/sh\necho {said.isoformat(timespec='seconds')}\n")
        squeue.chmod(0o755)
        assert bool(Interrupt(RunSection()).reason) is is_near
    squeue.write_text("#!/bin/sh\necho N/A\n")
    assert not Interrupt(RunSection()).reason
