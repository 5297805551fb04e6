"""A snapshot is a copy on the host, which later snapshots reuse where they can."""

import torch

from hqqtrain.checkpoint.snapshot import StateSnapshot
from hqqtrain.distributed.comm import SINGLE_PROCESS
from hqqtrain.distributed.gather import local_shard_of


def test_snapshot_is_a_copy():
    weight, snapshot = torch.ones(3), StateSnapshot(SINGLE_PROCESS)
    snapshot.take({"weight": local_shard_of(weight, weight, weight.shape)})
    weight.zero_()
    assert snapshot.tensors()["weight"].tolist() == [1, 1, 1]


def test_snapshot_of_a_tensor_that_has_grown():
    """Before the first step, bitsandbytes has no moments."""
    snapshot = StateSnapshot(SINGLE_PROCESS)
    nothing, moments = torch.empty(0), torch.arange(300, dtype=torch.uint8)
    snapshot.take(
        {"w/state1": local_shard_of(moments, nothing), "gone": local_shard_of(moments, moments)}
    )
    snapshot.take({"w/state1": local_shard_of(moments, moments)})
    assert snapshot.tensors().keys() == {"w/state1/0"}
    assert torch.equal(snapshot.tensors()["w/state1/0"], moments)


def test_memory_of_equal_shapes_is_reused():
    snapshot, weight = StateSnapshot(SINGLE_PROCESS), torch.ones(5, 3)
    snapshot.take({"weight": local_shard_of(weight, weight, weight.shape)})
    first = snapshot.tensors()["weight"].data_ptr()
    snapshot.take({"weight": local_shard_of(weight, 2 * weight, weight.shape)})
    assert snapshot.tensors()["weight"].data_ptr() == first
    assert torch.equal(snapshot.tensors()["weight"], 2 * weight)
