"""Shards of any dtype and size arrive on rank 0 in the order of their owners."""

from collections.abc import Callable

import pytest
import torch
from fake_group import fake_rank
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hqqtrain.distributed import gather
from hqqtrain.distributed.comm import SINGLE_PROCESS, Communicator
from hqqtrain.distributed.gather import (
    LocalShard,
    gather_to_rank0,
    local_shard_of,
    shard_index_and_count,
)

DTYPES = (torch.uint8, torch.bfloat16, torch.float32, torch.float64)


def _full(index: int) -> Tensor:
    """Return 2 to 11 rows of a dtype in turn; ranks of a group get different numbers of them."""
    torch.manual_seed(index)
    return torch.randint(0, 200, (2 + index, 3)).to(DTYPES[index % len(DTYPES)])


def _local_shards(rank: int, size: int) -> list[LocalShard]:
    """Return rows that are sharded evenly or not, with empty shards, and whole tensors between."""
    local_shards = []
    for full in map(_full, range(10)):
        chunks = [*full.chunk(size), *[full[:0]] * size]
        local_shards.append(LocalShard(chunks[rank], full.shape, tuple(range(size))))
        local_shards.append(LocalShard(full * 2, full.shape, (0,)))
    return local_shards


def arrive_whole(rank: int, comm: Communicator) -> None:
    for gather.GATHER_BYTES in (1, 1000, 1 << 27):
        check_local_shards(rank, comm)


def check_local_shards(rank: int, comm: Communicator) -> None:
    found = {}
    for index, shards in gather_to_rank0(_local_shards(rank, comm.size), comm):
        assert index not in found
        found[index] = torch.cat(shards).clone()
    if rank:
        assert found == {}
        return
    for index in range(10):
        assert torch.equal(found[2 * index], _full(index))
        assert torch.equal(found[2 * index + 1], _full(index) * 2)


@pytest.mark.ranks
def test_every_shard_arrives():
    assert on_ranks(arrive_whole, 3) == ["", "", ""]


def test_one_process_yields_its_tensors_without_a_group():
    local_shards = [LocalShard(_full(n), _full(n).shape, (0,)) for n in range(3)]
    found = list(gather_to_rank0(local_shards, SINGLE_PROCESS))
    assert [index for index, _ in found] == [0, 1, 2]
    assert all(shards[0] is local_shards[index].tensor for index, shards in found)


@pytest.mark.parametrize(("limit", "expected"), [
    (1, [[0], [1], [2]]), (97, [[0, 1], [2]]), (1 << 20, [[0, 1, 2]]),
])  # fmt: skip
def test_chunks_count_the_largest_shard_of_any_rank(
    monkeypatch: pytest.MonkeyPatch, limit: int, expected: list
):
    """Two ranks: 2 x 32, 2 x 32 and 2 x 16 bytes, after padding to 16."""
    monkeypatch.setattr(gather, "GATHER_BYTES", limit)
    large, small = (torch.float32, torch.Size([5])), (torch.uint8, torch.Size([3]))
    assert list(gather._chunks([[large, small, small], [small, large, small]])) == expected


def _assert_with_mesh(shape: tuple[int, ...], check: Callable[[Tensor], None]) -> None:
    linear = nn.Linear(3, 8)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    fully_shard(linear, mesh=mesh)
    check(linear.weight)


@pytest.mark.parametrize(("shape", "owners", "index_and_count"), [
    ((4,), (0, 1, 2, 3), (3, 4)), ((2, 2), (0, 1), (1, 2)),
])  # fmt: skip
def test_the_first_replica_owns_the_shards(shape, owners, index_and_count):
    def check(param: Tensor) -> None:
        part = torch.ones(2)
        assert local_shard_of(param, part) == LocalShard(part, None, owners)
        assert shard_index_and_count(param) == index_and_count

    with fake_rank(3, 4):
        _assert_with_mesh(shape, check)


def test_rank_0_owns_what_is_whole():
    part = torch.ones(2)
    assert local_shard_of(part, part, part.shape) == LocalShard(part, part.shape, (0,))
    assert shard_index_and_count(part) == (0, 1)
