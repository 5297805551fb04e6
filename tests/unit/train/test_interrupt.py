"""A wish to stop: by signals, by a time limit, by slurm's."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import psutil
import pytest

from hqqtrain.config import PreemptedError, RunSection, signals
from hqqtrain.dist import ALONE
from hqqtrain.train.interrupt import SPARE, Interrupt


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
    os.kill(os.getpid(), number)
    for check in (lambda: asked.check(ALONE), asked.check_alone):
        with pytest.raises(PreemptedError, match=f"{number.name} was received"):
            check()


def test_a_second_signal_ends_it_at_once():
    script = (
        "import os, signal, time; from hqqtrain.config import signals; signals.listen(); "
        "os.kill(os.getpid(), signal.SIGUSR1); os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)"
    )
    began = time.monotonic()
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 1
    assert time.monotonic() - began < 40


def test_a_time_limit_leaves_room_for_two_steps(monkeypatch: pytest.MonkeyPatch):
    began = psutil.Process().create_time()
    monkeypatch.setattr(time, "time", lambda: began + 3600 - SPARE - 50)
    asked = Interrupt(RunSection(time_limit="1:00:00"))
    asked.needs(3.0)
    before = asked.reason
    asked.needs(900.0)
    assert not before
    assert asked.reason
    with pytest.raises(PreemptedError, match=r"run\.time_limit=1:00:00"):
        asked.check(ALONE)
    asked.check_alone()  # a time limit is no signal: others would not know of it


def test_a_signal_after_a_time_limit_is_the_first(monkeypatch: pytest.MonkeyPatch):
    began = psutil.Process().create_time()
    monkeypatch.setattr(time, "time", lambda: began + 3600)
    asked = Interrupt(RunSection(time_limit="1:00:00"))
    assert "nearly reached" in asked.reason
    os.kill(os.getpid(), signal.SIGUSR1)
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
