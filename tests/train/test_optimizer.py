"""Learning-rate schedules, and optimizers that are refused before any work is done."""

import pytest
import torch
from torch import nn

from hqqtrain.common.errors import UserError
from hqqtrain.config.groups import OptimConfig
from hqqtrain.distributed.runtime import check_optimizer
from hqqtrain.train.optimizer import build_optimizer, learning_rate


def _rates(config: OptimConfig, steps: int) -> list[float]:
    return [learning_rate(config, step, steps) for step in range(steps)]


def test_warm_up_starts_above_zero_and_ends_at_the_peak():
    rates = _rates(OptimConfig(lr=1.0, warmup_steps=4, schedule="constant"), 8)
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1])


def test_cosine_and_linear_fall_from_the_peak_towards_zero():
    for schedule, middle in (("cosine", 0.5), ("linear", 0.5)):
        rates = _rates(OptimConfig(lr=1.0, warmup_steps=2, schedule=schedule), 12)
        assert rates[2] == pytest.approx(1)
        assert rates[7] == pytest.approx(middle)
        assert 0 < rates[-1] < 0.12
        assert sorted(rates[2:], reverse=True) == rates[2:]


@pytest.mark.parametrize(
    ("name", "strategy", "precision", "device"),
    [("adamw_8bit", "fsdp2", "fp16", "cuda"), ("paged_adamw", "single", "fp32", "cpu"),
     ("paged_adamw_8bit", "ddp", "bf16", "cpu"), ("adamw_8bit", "zero3", "bf16", "cuda")],
)  # fmt: skip
def test_unsupported_settings_are_refused(name: str, strategy: str, precision: str, device: str):
    with pytest.raises(UserError, match=f"optim.name={name}"):
        check_optimizer(OptimConfig(name=name), strategy, precision, torch.device(device))


def test_8_bit_states_train_on_a_cpu():
    bnb = pytest.importorskip("bitsandbytes")
    weight = nn.Parameter(torch.ones(64, 64))
    optimizer = build_optimizer(OptimConfig(name="adamw_8bit", lr=0.1), [weight])
    assert isinstance(optimizer, bnb.optim.AdamW8bit)
    for _ in range(3):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert weight.mean().item() == pytest.approx(0.7, abs=0.02)
