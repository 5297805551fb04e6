"""Rows, parts and memory of a parameter are the same view under every kind of sharding."""

import pytest
import torch
from fake_group import fake_rank
from ranks import CPU, on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from hqqtrain.distributed.comm import SINGLE_PROCESS, Communicator
from hqqtrain.distributed.local import (
    copy_from_full,
    full_tensor,
    global_numel,
    is_sharded,
    local_rows,
    local_tensor,
    materialize,
    replica_group,
    reshard,
)
from hqqtrain.training.optimizer import trainable_parameters

FULL = torch.arange(30.0).view(10, 3)


def _sharded(full: torch.Tensor, size: int) -> torch.Tensor:
    return distribute_tensor(full, init_device_mesh("cpu", (size,)), [Shard(0)], src_data_rank=None)


@pytest.mark.parametrize("size", [2, 3, 4, 7, 16])
def test_rows_are_those_of_torch_chunk(size: int):
    chunks = FULL.chunk(size)
    for rank in range(size):
        with fake_rank(rank, size):
            param = _sharded(FULL, size)
            mine = chunks[rank] if rank < len(chunks) else FULL[:0]
            assert torch.equal(FULL[local_rows(param)], mine)
            assert torch.equal(local_tensor(param), mine)
            assert (is_sharded(param), global_numel(param)) == (True, 30)
            copy_from_full(param, -FULL)
            assert torch.equal(param.to_local(), -mine)


def test_a_whole_parameter_is_its_own_part():
    param = nn.Parameter(FULL.clone())
    assert local_rows(param) == slice(0, 10)
    assert local_tensor(param).data_ptr() == full_tensor(param).data_ptr() == param.data_ptr()
    assert not local_tensor(param).requires_grad
    assert (is_sharded(param), global_numel(param)) == (False, 30)
    copy_from_full(param, -FULL)
    assert torch.equal(param.detach(), -FULL)


def test_replicas():
    assert replica_group(FULL, SINGLE_PROCESS) == (1, 0, None)
    with fake_rank(2, 4) as comm:
        assert replica_group(FULL, comm) == (4, 2, None), "every rank holds a whole parameter"
        assert replica_group(_sharded(FULL, 4), comm) == (1, 0, None)
        linear = nn.Linear(3, 10)
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(linear, mesh=mesh)
        size, rank, group = replica_group(linear.weight, comm)
        assert (size, rank) == (2, 1)
        assert torch.distributed.get_process_group_ranks(group) == [0, 2]
        assert local_rows(linear.weight) == slice(0, 5)


def _meta_model() -> nn.Module:
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 5, bias=False))
    model[2].weight = model[0].weight
    model[1].weight.requires_grad_(False)
    model.register_buffer("angles", torch.empty(3, device="meta"), persistent=False)
    model.register_buffer("absent", None)
    return model


def test_materialize_keeps_ties_flags_and_values_that_are_there():
    model = _meta_model()
    model[1].bias = nn.Parameter(torch.full((4,), 7.0))
    names = [name for name, _ in model.named_parameters()], model.state_dict().keys()
    materialize(model, CPU)
    assert names == ([name for name, _ in model.named_parameters()], model.state_dict().keys())
    tensors = [*model.parameters(), *model.buffers()]
    assert not any(tensor.is_meta for tensor in tensors)
    assert model[2].weight is model[0].weight
    assert (model[0].weight.requires_grad, model[1].weight.requires_grad) == (True, False)
    assert model[1].bias.tolist() == [7] * 4
    assert model.absent is None
    assert "angles" not in model.state_dict()


def test_offloaded_parameters_are_on_the_host_and_buffers_are_not():
    model = _meta_model()
    for parameter in model.parameters():
        assert parameter.is_meta
    materialize(model, torch.device("meta"), on_host=model.parameters())  # meta: a GPU
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert {b.device.type for b in model.buffers()} == {"meta"}


def _evaluates_and_takes_other_values(rank: int, comm: Communicator) -> None:
    model, x = nn.Linear(3, 4), torch.ones(1, 3)
    fully_shard(model, mesh=init_device_mesh("cpu", (comm.size,)))
    with torch.no_grad():
        model(x)  # leaves the root unsharded, because no backward pass follows
    params = trainable_parameters(model)
    assert all(is_sharded(param) for param in params.values())
    with torch.no_grad():
        model(x)
        reshard(model)
        for param in params.values():
            copy_from_full(param, torch.ones(param.shape))
        assert torch.equal(model(x), torch.full((1, 4), 4.0))


@pytest.mark.ranks
def test_parameters_are_shards_again_after_an_evaluation():
    assert on_ranks(_evaluates_and_takes_other_values, 2) == ["", ""]
