"""The optimizers that a recipe can name."""

import pytest
import torch
from torch import nn

from hqqtrain.config.groups import OptimConfig
from hqqtrain.train.optimizer import build_optimizer


def test_8_bit_states_train_on_a_cpu():
    bnb = pytest.importorskip("bitsandbytes")
    weight = nn.Parameter(torch.ones(64, 64))
    optimizer = build_optimizer(OptimConfig(name="adamw_8bit", lr=0.1), [weight])
    assert isinstance(optimizer, bnb.optim.AdamW8bit)
    for _ in range(3):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert weight.mean().item() == pytest.approx(0.7, abs=0.02)
