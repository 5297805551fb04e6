"""The trainable parameters, the optimizers that a recipe can name, and their learning rate."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from hqqtrain.config.groups import OptimConfig
from hqqtrain.training.optimizer import LearningRateSchedule, build_optimizer, trainable_parameters


def test_trainable_parameters_have_the_names_of_peft(make_model):
    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    found, expected = trainable_parameters(model), get_peft_model_state_dict(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(param.requires_grad for param in found.values())


def test_8_bit_states_train_on_a_cpu():
    bnb = pytest.importorskip("bitsandbytes")
    weight = nn.Parameter(torch.ones(64, 64))
    optimizer = build_optimizer(OptimConfig(name="adamw_8bit", lr=0.1), [weight])
    assert isinstance(optimizer, bnb.optim.AdamW8bit)
    for _ in range(3):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert weight.mean().item() == pytest.approx(0.7, abs=0.02)


def _rates(config: OptimConfig, steps: int) -> list[float]:
    schedule = LearningRateSchedule(config, steps)
    return [schedule.learning_rate(step) for step in range(steps)]


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


@pytest.mark.parametrize(("steps", "warns"), [(0, False), (3, True), (4, True), (5, False)])
def test_a_warm_up_without_end_is_reported(steps: int, warns: bool, caplog):
    with caplog.at_level(logging.WARNING):
        LearningRateSchedule(OptimConfig(warmup_steps=4), steps)
    assert ("so all of them warm up" in caplog.text) is warns
