"""Preemption by signals, by `run.time_limit` and by slurm's time limit."""

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

from hqqtrain.common import signals
from hqqtrain.common.errors import PreemptedError
from hqqtrain.config.infra import RunDirConfig
from hqqtrain.distributed.comm import SINGLE_PROCESS
from hqqtrain.distributed.preemption import (
    SLOW_DISK_BYTES_PER_SECOND,
    SPARE_SECONDS,
    PreemptionHandler,
)


@pytest.fixture(autouse=True)
def _signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("SLURM_JOB_END_TIME", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    signals.listen_for_signals()
    yield
    signals.listen_for_signals()  # forgets the signal of this test
    signal.set_wakeup_fd(-1)  # so that signals of later tests are not recorded
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_a_signal_stops_all_ranks_at_the_next_check(number: signal.Signals):
    preemption = PreemptionHandler(RunDirConfig())
    assert not preemption.stop_reason
    preemption.check(SINGLE_PROCESS)
    send(number)
    for check in (lambda: preemption.check(SINGLE_PROCESS), preemption.check_local):
        with pytest.raises(PreemptedError, match=f"{number.name} was received"):
            check()


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    end = time.monotonic() + 10
    while not signals.received_signal():  # a thread receives it
        assert time.monotonic() < end
        time.sleep(0.001)


BUSY = """
import hashlib, os, signal, sys, threading, time
from hqqtrain.common import signals
signals.listen_for_signals()
pause = float(sys.argv[1])
def send():
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(pause)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=send).start()
hashlib.pbkdf2_hmac("sha256", b"", b"", 12_000_000)  # no Python code runs here, as in a collective
print(signals.received_signal())
"""


@pytest.mark.parametrize(("pause", "code"), [("0.1", 0), ("2.5", 1)])
def test_a_second_signal_ends_the_process_unless_it_follows_at_once(pause: str, code: int):
    command = [sys.executable, "-c", BUSY, pause]
    done = subprocess.run(command, timeout=120, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "" if code else "SIGUSR1\n"), done.stderr


def test_a_time_limit_leaves_room_for_two_steps(monkeypatch: pytest.MonkeyPatch):
    began = psutil.Process().create_time()
    monkeypatch.setattr(time, "time", lambda: began + 3600 - SPARE_SECONDS - 50)
    preemption = PreemptionHandler(RunDirConfig(time_limit="1:00:00"))
    preemption.record_step_seconds(3.0)
    before = preemption.stop_reason
    preemption.record_step_seconds(900.0)
    assert not before
    assert preemption.stop_reason
    with pytest.raises(PreemptedError, match=r"run\.time_limit=1:00:00"):
        preemption.check(SINGLE_PROCESS)
    preemption.check_local()  # a time limit is no signal, and other ranks do not know it


def test_a_time_limit_leaves_room_for_checkpoints(monkeypatch: pytest.MonkeyPatch):
    began = psutil.Process().create_time()
    monkeypatch.setattr(time, "time", lambda: began + 3600 - SPARE_SECONDS - 50)
    estimated, preemption = (
        PreemptionHandler(RunDirConfig(time_limit="1:00:00")) for _ in range(2)
    )
    for each in (estimated, preemption):
        each.expect_checkpoint_bytes(int(60 * SLOW_DISK_BYTES_PER_SECOND))  # before any was written
    assert estimated.stop_reason
    for each in (estimated, preemption):
        each.record_write_seconds(10.0)
    assert estimated.stop_reason, "once near, the limit stays near"
    assert not preemption.stop_reason
    preemption.record_step_seconds(16.0)
    assert preemption.stop_reason


def test_all_ranks_report_the_reason():
    preemption = PreemptionHandler(RunDirConfig())
    comm = SimpleNamespace(all_gather_object=lambda mine: [mine, "SIGTERM was received", mine])
    with pytest.raises(PreemptedError, match=r"^rank 1: SIGTERM was received$"):
        preemption.raise_preempted(comm)


def test_a_signal_takes_precedence_over_a_time_limit(monkeypatch: pytest.MonkeyPatch):
    began = psutil.Process().create_time()
    monkeypatch.setattr(time, "time", lambda: began + 3600)
    preemption = PreemptionHandler(RunDirConfig(time_limit="1:00:00"))
    assert "nearly reached" in preemption.stop_reason
    send(signal.SIGUSR1)
    assert preemption.stop_reason == "SIGUSR1 was received"


def test_slurm_time_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 2))
    assert PreemptionHandler(RunDirConfig()).stop_reason
    # The user's limit replaces slurm's.
    assert not PreemptionHandler(RunDirConfig(time_limit="9:00:00")).stop_reason
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    squeue = tmp_path / "squeue"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not PreemptionHandler(RunDirConfig()).stop_reason  # without squeue no limit is known
    for end, is_near in ((datetime.now(), True), (datetime.now() + timedelta(hours=1), False)):
        squeue.write_text(f"#!/bin/sh\necho {end.isoformat(timespec='seconds')}\n")
        squeue.chmod(0o755)
        assert bool(PreemptionHandler(RunDirConfig()).stop_reason) is is_near
    squeue.write_text("#!/bin/sh\necho N/A\n")
    assert not PreemptionHandler(RunDirConfig()).stop_reason
