"""bitsandbytes on FSDP2's shards steps as on full tensors, with real processes."""

import pytest
import torch
from ranks import on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hqqtrain.config.groups import OptimConfig
from hqqtrain.distributed.comm import Communicator
from hqqtrain.distributed.local import full_tensor
from hqqtrain.training.optimizer import build_optimizer

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.ranks


def make_model() -> nn.Sequential:
    """Build two layers whose shards have the same optimizer state as the full tensors.

    The shards of the first layer are whole blocks of 256 elements, so the 8-bit states agree. The
    second layer is too small for 8 bits; ranks share its rows unevenly, and one gets none.
    """
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 128, bias=False), nn.Linear(128, 3, bias=False))


def steps(rank: int, comm: Communicator) -> None:
    alone, model = make_model(), make_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (comm.size,)))
    config = OptimConfig(name="adamw_8bit", lr=0.01, weight_decay=0.1)
    optimizers = [build_optimizer(config, list(each.parameters())) for each in (alone, model)]
    for step in range(4):
        torch.manual_seed(step)
        x = torch.randn(5, 128)
        for each, optimizer in zip((alone, model), optimizers, strict=True):
            each(x).square().sum().backward()
            optimizer.step()
        assert all(p.grad is None for p in model.parameters())
        alone.zero_grad()
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(full_tensor(ours), theirs.detach(), rtol=1e-5, atol=1e-6)
        assert not torch.equal(theirs.detach(), make_model()[0].weight)


@pytest.mark.parametrize("size", [2, 4])
def test_sharded_steps_equal_unsharded_steps(size: int):
    assert on_ranks(steps, size) == [""] * size
