"""A rank that fails by itself says why on all ranks, with real processes."""

import os
import time

import pytest
from ranks import on_ranks

from hqqtrain.common.errors import PreemptedError, RankLostError, UserError
from hqqtrain.distributed.comm import Communicator
from hqqtrain.distributed.failure import share_failure

pytestmark = pytest.mark.ranks


def _fail(rank: int, comm: Communicator, failing: int, error: Exception | None) -> None:
    """Raise `error` on one rank, and wait for this rank on the others."""
    with share_failure(comm):
        if rank == failing and error:
            raise error
        if rank == failing:
            os._exit(7)
        comm.barrier()


def test_without_a_failure_nothing_happens():
    assert on_ranks(_fail, 2, 5, None) == ["", ""]


def test_rank_0_says_why_rank_1_has_failed():
    first, second = on_ranks(_fail, 2, 1, RuntimeError("boom"))
    assert first == "rank 1 failed: RuntimeError: boom"
    assert second == "RuntimeError: boom"


@pytest.mark.parametrize(
    "error", [UserError("r: too small"), PreemptedError("SIGTERM"), MemoryError("all")]
)
def test_an_error_that_the_ranks_share_keeps_its_kind(error: Exception):
    first, second = on_ranks(_fail, 2, 1, error)
    assert first == second
    assert str(error) in first


def _lose(rank: int, comm: Communicator) -> None:
    with share_failure(comm):
        raise RankLostError("rank 5: its store is gone (Connection reset by peer)")


def test_what_another_rank_has_said_already_is_kept():
    assert on_ranks(_lose, 2) == ["rank 5: its store is gone (Connection reset by peer)"] * 2


def test_a_rank_that_vanishes_is_a_lost_connection():
    start = time.monotonic()
    (message,) = on_ranks(_fail, 2, 1, None, lost=1)
    assert message.startswith("the connection to another rank was lost")
    assert time.monotonic() - start < 30


def test_an_error_of_rank_0_ends_the_others(capfd):
    first, second = on_ranks(_fail, 2, 0, RuntimeError("boom"))
    assert first == "RuntimeError: boom"
    assert second in (
        "rank 0 failed: RuntimeError: boom",
        "the connection to another rank was lost: it has ended, or its machine is gone. If it has "
        "failed, its own output says why.",
    )
