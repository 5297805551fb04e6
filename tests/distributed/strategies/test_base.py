"""A strategy that overrides nothing leaves the model whole; all share a few functions."""

import pytest
import torch
from fake_group import fake_rank
from torch import distributed, nn

from hqqtrain.distributed.comm import SINGLE_PROCESS
from hqqtrain.distributed.strategies.base import (
    STORAGE_DTYPES,
    Strategy,
    ensure_process_group,
    probe_layer,
    storage_dtype_name,
)
from hqqtrain.distributed.strategies.registry import STRATEGIES


def test_by_default_the_model_stays_as_it_is():
    strategy, model, weight = Strategy(SINGLE_PROCESS), nn.Linear(2, 2), torch.ones(3)
    strategy.check_model(model)
    strategy.shard(model)
    assert strategy.wrap(model) is model
    assert strategy.roundtrip(weight) is weight


@pytest.mark.parametrize("strategy", STRATEGIES.values())
def test_shards(strategy: type[Strategy]):
    made = strategy(SINGLE_PROCESS)
    assert made.parameter_shards(8) == (8 if made.shards_parameters else 1)
    assert made.adapter_shards(8) == (8 if made.shards_adapters else 1)
    assert made.shards_adapters <= made.shards_parameters, "adapters are the smaller part"
    assert not (made.shards_adapters and made.uses_ddp), "DDP averages whole gradients only"


@pytest.mark.parametrize("strategy", STRATEGIES.values())
def test_only_shards_are_gathered(strategy: type[Strategy]):
    made = strategy(SINGLE_PROCESS)

    def root_bytes(world_size: int) -> int:
        sizes = {"layers": 1000, "itemsize": 2}
        without = made.gathered_bytes(world_size, root=0, **sizes)
        return made.gathered_bytes(world_size, root=80, **sizes) - without

    assert root_bytes(1) == 0
    assert root_bytes(8) >= (70 if made.shards_parameters else 0)
    assert (root_bytes(8) > 0) == made.shards_parameters


def test_names_of_storage_dtypes():
    for name, dtype in STORAGE_DTYPES.items():
        assert storage_dtype_name(dtype) == name


def test_a_group_is_created_once_and_only_for_a_single_process():
    ensure_process_group(2)
    assert not distributed.is_initialized(), "a launcher creates the group of several processes"
    ensure_process_group(1)
    try:
        group = distributed.group.WORLD
        ensure_process_group(1)
        assert distributed.group.WORLD is group
    finally:
        distributed.destroy_process_group()
    with fake_rank(1, 2):
        ensure_process_group(2)
        assert distributed.get_rank() == 1


def test_the_probe_has_a_frozen_copy_beside_trained_parameters():
    weight = torch.arange(6, dtype=torch.uint8).view(2, 3)
    module = probe_layer(weight)
    probe = module.get_parameter("W_q")
    assert torch.equal(probe, weight)
    assert probe.data_ptr() != weight.data_ptr()
    assert not probe.requires_grad
    assert any(param.requires_grad for param in module.parameters())
