"""A wish to stop: by signals, by a time limit, by slurm's."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from hqqtrain.config import PreemptedError, RunSection
from hqqtrain.dist import ALONE
from hqqtrain.train.interrupt import SIGNALS, SPARE, Interrupt


@pytest.fixture(autouse=True)
def _signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_heard_where_ranks_meet(number: signal.Signals):
    asked = Interrupt(RunSection())
    asked.listen()
    assert not asked.is_asked
    asked.check(ALONE)
    os.kill(os.getpid(), number)
    assert asked.is_asked
    for check in (lambda: asked.check(ALONE), asked.check_alone):
        with pytest.raises(PreemptedError, match=f"{number.name} was received"):
            check()


def test_a_second_signal_ends_it_at_once():
    script = (
        "import os, signal, time; from hqqtrain.config import RunSection; "
        "from hqqtrain.train.interrupt import Interrupt; Interrupt(RunSection()).listen(); "
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
    before = asked.is_asked
    asked.needs(900.0)
    assert not before
    assert asked.is_asked
    with pytest.raises(PreemptedError, match=r"run\.time_limit=1:00:00"):
        asked.check(ALONE)
    asked.check_alone()  # a time limit is no signal: others would not know of it


def test_slurm_says_when_a_job_ends(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 2))
    assert Interrupt(RunSection()).is_asked
    assert not Interrupt(RunSection(time_limit="9:00:00")).is_asked  # the user's word counts
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 3600))
    assert not Interrupt(RunSection()).is_asked
