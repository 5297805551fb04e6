"""If one rank fails or vanishes, all ranks stop and report which one and why."""

import os
import signal
import time

import pytest
from ranks import on_ranks

from hqqtrain.common.errors import PreemptedError, RankLostError, UserError
from hqqtrain.distributed import heartbeat
from hqqtrain.distributed.comm import Communicator
from hqqtrain.distributed.heartbeat import Heartbeat

pytestmark = pytest.mark.ranks


def work(comm: Communicator, seconds: float, fault: Exception | None = None) -> None:
    """Work for some seconds in small steps, then raise `fault`, if any."""
    heartbeat.LOST_AFTER_SECONDS = 3.0
    with Heartbeat(comm) as watching:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            watching.check()
            time.sleep(0.05)
        if fault:
            raise fault


def one_is_slow(rank: int, comm: Communicator) -> None:
    began = time.monotonic()
    work(comm, 2.5 * rank)
    assert time.monotonic() - began > 4.9, "every rank must wait for the slowest"
    work(comm, 0.1)  # a second watch has its own keys


def all_end_together(rank: int, comm: Communicator) -> None:
    """The end of work is told at once, and not with the next heartbeat."""
    heartbeat.HEARTBEAT_SECONDS, heartbeat.LOST_AFTER_SECONDS = 20, 80
    began = time.monotonic()
    for _ in range(3):
        with Heartbeat(comm):
            pass
    assert time.monotonic() - began < heartbeat.HEARTBEAT_SECONDS / 2


def one_is_awaited(rank: int, comm: Communicator) -> None:
    """The end of one rank is seen at once by those that wait for it, and not after a heartbeat."""
    heartbeat.HEARTBEAT_SECONDS, heartbeat.LOST_AFTER_SECONDS = 20, 80
    began = time.monotonic()
    with Heartbeat(comm) as watching:
        if rank == 1:
            time.sleep(0.2)
        watching.wait_for(1, lambda: None)
    assert time.monotonic() - began < heartbeat.HEARTBEAT_SECONDS / 2


def one_finds_bad_data(rank: int, comm: Communicator) -> None:
    work(comm, 0.5 if rank == 1 else 60, UserError("w: row 3 holds nan") if rank == 1 else None)


def one_is_preempted(rank: int, comm: Communicator) -> None:
    work(comm, 0.5 if rank == 1 else 60, PreemptedError("SIGUSR1") if rank == 1 else None)


def one_breaks(rank: int, comm: Communicator) -> None:
    work(comm, 0.5 if rank == 0 else 60, OSError("disk on fire") if rank == 0 else None)


def one_fails_last(rank: int, comm: Communicator) -> None:
    """Fail on one rank after the others have ended their work and wait."""
    work(comm, 2.0 if rank == 2 else 0.1, UserError("w: late") if rank == 2 else None)


class SlowReader(Heartbeat):
    """Heartbeat of a rank that reads the states of the others late."""

    def _read_states(self) -> None:
        time.sleep(1.5)
        super()._read_states()


def one_reads_late(rank: int, comm: Communicator) -> None:
    """Fail on rank 2 while rank 1, which has ended, is slow to read; rank 0 must not leave it."""
    if rank == 1:
        with SlowReader(comm):
            return
    one_fails_last(rank, comm)


def one_gets_signal(rank: int, comm: Communicator, lost: int, number: signal.Signals) -> None:
    """Send a signal to rank `lost` while all ranks work.

    Rank 0 hosts the store. After SIGSTOP it behaves like a machine without power: its connections
    stay open, but nobody answers.
    """
    if rank == lost:
        with Heartbeat(comm):
            time.sleep(1)
            os.kill(os.getpid(), number)
    work(comm, 60)


def test_preemption_of_one_rank_stops_all():
    assert on_ranks(one_is_preempted, 3) == ["PreemptedError: SIGUSR1"] * 3


@pytest.mark.parametrize("case", [one_is_slow, all_end_together, one_is_awaited])
def test_ranks_leave_together(case):
    assert on_ranks(case, 3) == [""] * 3


@pytest.mark.parametrize("case", [one_finds_bad_data, one_fails_last, one_reads_late])
def test_a_user_error_is_the_same_on_all_ranks(case):
    expected = "w: row 3 holds nan" if case is one_finds_bad_data else "w: late"
    began = time.monotonic()
    assert on_ranks(case, 3) == [expected] * 3
    assert time.monotonic() - began < 40


def test_any_other_error_names_its_rank():
    answers = on_ranks(one_breaks, 3)
    assert answers[0] == "OSError: disk on fire"
    assert answers[1:] == ["rank 0 failed: OSError: disk on fire"] * 2


@pytest.mark.parametrize(("lost", "number", "message"), [
    (1, signal.SIGKILL, "rank 1 is gone: no heartbeat"),
    (0, signal.SIGKILL, "gone"),
    (0, signal.SIGSTOP, "the process that hosts the store"),
])  # fmt: skip
def test_a_rank_that_vanishes(lost, number, message):
    began = time.monotonic()
    answers = on_ranks(one_gets_signal, 3, lost, number, lost=lost)
    assert [message in answer for answer in answers] == [True, True], answers
    assert time.monotonic() - began < 45


class Store:
    """Store in which only the state of rank 1 exists."""

    text = b"{}"

    def multi_get(self, keys: list[str]) -> list[bytes]:
        assert keys == ["1"]
        return [self.text]


def test_a_suspended_process_does_not_blame_others(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    watching = Heartbeat(Communicator(0, 2, None))  # type: ignore[arg-type]
    watching._store, watching._last_read_time = Store(), now
    watching._last_change_times = {1: now}
    for now in (1001.0, 1001.0 + 3 * heartbeat.LOST_AFTER_SECONDS):  # noqa: B007 (the clock reads it)
        watching._read_states()
    watching.check()
    for _ in range(60):  # this rank reads regularly, the other one is silent
        now += heartbeat.LOST_AFTER_SECONDS / 40
        watching._read_states()
    with pytest.raises(RankLostError, match="rank 1 is gone"):
        watching.check()
    watching._store.text = b'{"beat": 7}'
    watching._read_states()
    watching.check()


def test_a_single_rank_needs_no_store():
    with Heartbeat(Communicator(0, 1, None)) as watching:  # type: ignore[arg-type]
        watching.check()
