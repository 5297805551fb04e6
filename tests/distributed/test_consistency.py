"""The sentinel finds changed bits and diverging ranks, with real processes."""

from pathlib import Path

import pytest
import torch
from ranks import CPU, on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hqqtrain.distributed.comm import Communicator
from hqqtrain.distributed.consistency import ConsistencyChecker, ReplicaMismatchError
from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain.quant.spec import QuantSpec

pytestmark = pytest.mark.ranks


def make_model() -> nn.Sequential:
    """Build a packed layer, viewed as bf16 with NaN patterns among its codes, and a trained one."""
    torch.manual_seed(0)
    spec = QuantSpec(4, 32, 1, "rtn", torch.bfloat16)
    packed = HQQLinear.from_linear(
        nn.Linear(64, 48, bias=False), spec, compute_dtype=torch.float32,
        storage_dtype=torch.bfloat16,
    )  # fmt: skip
    packed.W_q.data.view(torch.uint8)[3, :4] = 255
    return nn.Sequential(packed, nn.Linear(48, 4))


def flip(tensor: torch.Tensor) -> None:
    """Flip the lowest bit of the last byte of the first row."""
    tensor.detach().view(torch.uint8)[0, -1] ^= 1


def test_training_passes_the_check():
    model = make_model()
    sentinel = ConsistencyChecker(model, Communicator(0, 1, CPU))
    with torch.no_grad():
        model[1].weight.add_(1.0)
    sentinel.check()
    assert sentinel.checks == 1
    assert sentinel.seconds > 0


@pytest.mark.parametrize("tensor", ["W_q", "scale", "zero"])
def test_one_bit_of_a_frozen_weight_is_noticed(tensor: str):
    model = make_model()
    sentinel = ConsistencyChecker(model, Communicator(0, 1, CPU))
    flip(getattr(model[0], tensor))
    with pytest.raises(
        ReplicaMismatchError, match=rf"rank 0: 0\.{tensor}, which is frozen, has changed"
    ):
        sentinel.check()


def _flip_on_rank_1(rank: int, comm: Communicator, name: str) -> None:
    model = make_model()
    sentinel = ConsistencyChecker(model, comm)
    if rank == 1:
        flip(model.get_parameter(name))
    sentinel.check()


def diverges_in_training(rank: int, comm: Communicator) -> None:
    _flip_on_rank_1(rank, comm, "1.weight")


def starts_different(rank: int, comm: Communicator) -> None:
    model = make_model()
    with torch.no_grad():
        model[1].bias.add_(rank)
    ConsistencyChecker(model, comm)


def shard_altered(rank: int, comm: Communicator) -> None:
    model = make_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (comm.size,)))
    sentinel = ConsistencyChecker(model, comm)
    sentinel.check()
    if rank == 1:
        flip(model[0].W_q.to_local())
    sentinel.check()


def replica_altered(rank: int, comm: Communicator) -> None:
    """Change one of two replicas: ranks 1 and 3 hold the same trained shard."""
    model = make_model()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(model, mesh=mesh)
    sentinel = ConsistencyChecker(model, comm)
    sentinel.check()
    if rank == 3:
        flip(model[1].weight.to_local())
    sentinel.check()


def shards_trained(rank: int, comm: Communicator) -> None:
    model = make_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (comm.size,)))
    with torch.no_grad():
        model(torch.randn(3, 64))
    sentinel = ConsistencyChecker(model, comm)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    model(torch.randn(3, 64)).sum().backward()
    optimizer.step()
    sentinel.check()


def test_diverged_ranks_are_named():
    two, three = on_ranks(diverges_in_training, 2), on_ranks(diverges_in_training, 3)
    assert len({*two}) == len({*three}) == 1  # all ranks raise the same message
    assert two[0].startswith("rank 1: 1.weight differs from that of 1 other ranks.")
    assert three[0].startswith("rank 1: 1.weight differs from that of 2 other ranks.")


def test_ranks_that_start_different_are_named():
    assert "rank 1: 1.bias differs" in on_ranks(starts_different, 2)[0]


def test_a_changed_shard_is_named_with_its_rank():
    found = on_ranks(shard_altered, 2)
    assert found[0] == found[1]
    assert found[0].startswith("rank 1: 0.W_q, which is frozen, has changed.")


def test_replicas_of_a_shard_are_compared():
    found = on_ranks(replica_altered, 4)
    assert len({*found}) == 1
    assert found[0].startswith("rank 3: 1.weight differs from that of 1 other ranks.")


def test_trained_shards_pass_the_check(tmp_path: Path):
    assert on_ranks(shards_trained, 2) == ["", ""]
