"""Replicas of hybrid sharding, and the memory of gathered parameters."""

import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.distributed.comm import SINGLE_PROCESS
from hqqtrain.distributed.strategies.fsdp2 import FSDP2, count_replicas


@pytest.mark.parametrize(
    ("local_sizes", "replicas"), [([2, 2, 2, 2], 2), ([1, 1], 2), ([4] * 4, 1), ([0], 1)]
)
def test_one_replica_per_node(local_sizes, replicas):
    assert count_replicas(local_sizes) == replicas


@pytest.mark.parametrize("local_sizes", [[0, 0], [3, 3, 3, 1], [3, 3, 3, 3]])
def test_nodes_of_different_or_unknown_sizes_are_refused(local_sizes):
    with pytest.raises(UserError, match=r"parallel\.hsdp=true: \d ranks are not whole nodes of"):
        count_replicas(local_sizes)


def test_replicas_divide_the_number_of_shards():
    assert FSDP2(SINGLE_PROCESS).parameter_shards(8) == 8
    hybrid = FSDP2(SINGLE_PROCESS, replicas=2)
    assert (hybrid.parameter_shards(8), hybrid.adapter_shards(8)) == (4, 4)


def test_bytes_that_are_gathered():
    sizes = {"root": 80, "layers": 1000, "itemsize": 2}
    assert FSDP2(SINGLE_PROCESS).gathered_bytes(1, **sizes) == 0
    assert FSDP2(SINGLE_PROCESS).gathered_bytes(8, **sizes) == 70 + 80
    assert FSDP2(SINGLE_PROCESS, offloads_parameters=True).gathered_bytes(8, **sizes) == 160
