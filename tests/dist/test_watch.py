"""A rank that fails or vanishes ends the work of all, and they say which and why."""

import os
import signal
import time

import pytest
from dist.ranks import on_ranks

from hqqtrain.config import PreemptedError, RankLostError, UserError
from hqqtrain.dist import Processes, watch
from hqqtrain.dist.watch import Watch


def work(processes: Processes, seconds: float, fault: Exception | None = None) -> None:
    """So many seconds of it, in small steps, at whose end `fault` is raised."""
    watch.LOST_AFTER = 3.0
    with Watch(processes) as watching:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            watching.check()
            time.sleep(0.05)
        if fault:
            raise fault


def all_is_well(rank: int, processes: Processes) -> None:
    began = time.monotonic()
    work(processes, 5.0 * rank)
    assert time.monotonic() - began > 9.9, "they leave together"
    work(processes, 0.1)  # again, with the same names


def one_finds_a_fault(rank: int, processes: Processes) -> None:
    work(
        processes, 0.5 if rank == 1 else 60, UserError("w: row 3 holds nan") if rank == 1 else None
    )


def one_is_told_to_stop(rank: int, processes: Processes) -> None:
    work(processes, 0.5 if rank == 1 else 60, PreemptedError("SIGUSR1") if rank == 1 else None)


def one_breaks(rank: int, processes: Processes) -> None:
    work(processes, 0.5 if rank == 0 else 60, OSError("disk on fire") if rank == 0 else None)


def one_fails_last(rank: int, processes: Processes) -> None:
    """The others have done their part and wait."""
    work(processes, 2.0 if rank == 2 else 0.1, UserError("w: late") if rank == 2 else None)


def one_is_sent(rank: int, processes: Processes, lost: int, number: signal.Signals) -> None:
    """The first rank hosts the store. Stopped, it is as a machine without power: connections stay
    open, and nobody answers."""
    if rank == lost:
        with Watch(processes):
            time.sleep(1)
            os.kill(os.getpid(), number)
    work(processes, 60)


def test_a_wish_to_stop_is_everyones():
    assert on_ranks(one_is_told_to_stop, 3) == ["PreemptedError: SIGUSR1"] * 3


def test_they_leave_together():
    assert on_ranks(all_is_well, 3) == [""] * 3


@pytest.mark.parametrize("case", [one_finds_a_fault, one_fails_last])
def test_a_fault_of_the_data_is_the_same_on_all(case):
    expected = "w: row 3 holds nan" if case is one_finds_a_fault else "w: late"
    began = time.monotonic()
    assert on_ranks(case, 3) == [expected] * 3
    assert time.monotonic() - began < 40


def test_another_fault_is_told_with_its_rank():
    answers = on_ranks(one_breaks, 3)
    assert answers[0] == "OSError: disk on fire"
    assert answers[1:] == ["rank 0 failed: OSError: disk on fire"] * 2


@pytest.mark.parametrize(("lost", "number", "said"), [
    (1, signal.SIGKILL, "rank 1 is gone: no heartbeat"),
    (0, signal.SIGKILL, "gone"),
    (0, signal.SIGSTOP, "the process that hosts the store"),
])  # fmt: skip
def test_a_rank_that_vanishes(lost, number, said):
    began = time.monotonic()
    answers = on_ranks(one_is_sent, 3, lost, number, lost=lost)
    assert [said in answer for answer in answers] == [True, True], answers
    assert time.monotonic() - began < 45


class Store:
    """Says what rank 1 says."""

    text = b"{}"

    def multi_get(self, keys: list[str]) -> list[bytes]:
        assert keys == ["1"]
        return [self.text]


def test_a_process_that_was_held_up_itself_accuses_nobody(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    watching = Watch(Processes(0, 2, None))  # type: ignore[arg-type]
    watching._store, watching._read_at, watching._changed_at = Store(), now, {1: now}
    for now in (1001.0, 1001.0 + 3 * watch.LOST_AFTER):  # noqa: B007 (the clock reads it)
        watching._read_states()
    watching.check()
    for _ in range(60):  # while this one looks, the other says nothing
        now += watch.LOST_AFTER / 40
        watching._read_states()
    with pytest.raises(RankLostError, match="rank 1 is gone"):
        watching.check()
    watching._store.text = b'{"beat": 7}'
    watching._read_states()
    watching.check()


def test_one_rank_alone_needs_no_store():
    with Watch(Processes(0, 1, None)) as watching:  # type: ignore[arg-type]
        watching.check()
