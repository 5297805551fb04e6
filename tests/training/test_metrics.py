"""Metrics of a step by the names that users rely on, and FLOPs that can be counted by hand."""

import pytest
from peft.utils import ModulesToSaveWrapper
from torch import nn

from hqqtrain.config.quant import QuantConfig
from hqqtrain.nn.replace import quantize_model
from hqqtrain.training.metrics import flops_per_token, mfu_per_token_rate, peak_flops, step_metrics
from hqqtrain.training.state import StepResult

STEP = StepResult(
    3, 4, 500, 1.5, learning_rate=0.1, peak_memory_gib=2.5, grad_norm=0.7, seconds=2,
    all_tokens=800,
)  # fmt: skip


def test_names_and_values():
    assert step_metrics(STEP, epoch=0.25, mfu_per_token_rate=None) == {
        "train/loss": 1.5,
        "train/grad_norm": 0.7,
        "train/learning_rate": 0.1,
        "train/epoch": 0.25,
        "train/global_step": 3,
        "train/tokens_per_second": 250.0,
        "train/all_tokens_per_second": 400.0,
        "memory/peak_gib": 2.5,
    }


def test_mfu_where_the_peak_of_the_device_is_known():
    metrics = step_metrics(STEP, epoch=0.25, mfu_per_token_rate=0.001)
    assert metrics["train/mfu"] == pytest.approx(0.4)


def test_frozen_layers_take_four_flops_and_trained_ones_six():
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16))
    quantize_model(model, QuantConfig(group_size=32, skip=["1"]))
    assert flops_per_token(model) == 4 * 64 * 32 + 6 * 32 * 16
    model[1].requires_grad_(False)
    assert flops_per_token(model) == 4 * (64 * 32 + 32 * 16)


def test_devices_are_found_by_part_of_their_name():
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("cpu") is None


def test_utilization_is_a_share_of_all_devices():
    model = nn.Linear(1000, 1000, bias=False)
    assert mfu_per_token_rate(model, "NVIDIA H200", 2) == 6e6 / (2 * 989e12)
    assert mfu_per_token_rate(model, "cpu", 1) is None


def test_the_original_of_a_module_that_is_trained_in_full_takes_no_flops():
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16))
    quantize_model(model, QuantConfig(group_size=32, skip=["1"]))
    model[1] = ModulesToSaveWrapper(model[1], "default")
    assert flops_per_token(model) == 4 * 64 * 32 + 6 * 32 * 16
