"""Errors and results of rank 0 reach all ranks, with real processes."""

import pytest
from ranks import on_ranks

from hqqtrain.common.errors import PreemptedError, UserError
from hqqtrain.distributed.comm import (
    SINGLE_PROCESS,
    Communicator,
    deserialize_error,
    serialize_error,
)

pytestmark = pytest.mark.ranks


def _result_of_rank0(rank: int, comm: Communicator) -> None:
    assert comm.run_on_rank0(lambda: {"rank": rank}) == {"rank": 0}
    assert comm.run_on_rank0(lambda: None) is None


def _fails_on_rank0(rank: int, comm: Communicator, error: Exception) -> None:
    def work() -> None:
        assert rank == 0
        raise error

    comm.run_on_rank0(work)


def _keys(rank: int, comm: Communicator) -> None:
    keys = [comm.new_store_key("heartbeat") for _ in range(2)]
    assert keys[0] != keys[1]
    assert comm.all_gather_object(keys) == [keys] * comm.size


@pytest.mark.parametrize("case", [_result_of_rank0, _keys])
def test_all_ranks_get_the_same(case):
    assert on_ranks(case, 3) == [""] * 3


def test_an_error_of_the_user_is_the_same_on_all_ranks():
    assert on_ranks(_fails_on_rank0, 3, UserError("disk: full")) == ["disk: full"] * 3
    assert (
        on_ranks(_fails_on_rank0, 2, PreemptedError("SIGTERM")) == ["PreemptedError: SIGTERM"] * 2
    )


class _KeyMissingError(UserError):
    """A kind of UserError that the other ranks do not know by name."""


def test_a_subclass_of_a_user_error_stays_one_on_all_ranks():
    error = deserialize_error(1, serialize_error(_KeyMissingError("key: missing")))
    assert (type(error), str(error)) == (UserError, "key: missing")
    assert serialize_error(None) == ""


def test_any_other_error_names_its_rank():
    first, second = on_ranks(_fails_on_rank0, 2, OSError("disk on fire"))
    assert first == "OSError: disk on fire"
    assert second == "rank 0 failed: OSError: disk on fire"


def test_a_single_process_needs_no_group():
    assert SINGLE_PROCESS.run_on_rank0(lambda: 7) == 7
    with pytest.raises(OSError, match="full"):
        _fails_on_rank0(0, SINGLE_PROCESS, OSError("full"))


@pytest.mark.parametrize("error", [OSError(28, "No space left", "x"), MemoryError("too much")])
def test_a_full_disk_or_memory_of_one_rank_is_that_of_all(error):
    found = deserialize_error(1, serialize_error(error))
    assert type(found) is type(error)
    assert getattr(found, "errno", None) == getattr(error, "errno", None)
    first, second = on_ranks(_fails_on_rank0, 2, error)
    assert first.partition(":")[0] == second.partition(":")[0] == type(error).__name__
