"""Metrics of a step: the names that users and trackers rely on."""

import pytest

from hqqtrain.train.metrics import step_metrics
from hqqtrain.train.state import StepResult

STEP = StepResult(3, 4, 500, 1.5, learning_rate=0.1, peak_memory_gib=2.5, grad_norm=0.7, seconds=2)


def test_names_and_values():
    assert step_metrics(STEP, epoch=0.25, mfu_per_token_rate=None) == {
        "train/loss": 1.5,
        "train/grad_norm": 0.7,
        "train/learning_rate": 0.1,
        "train/epoch": 0.25,
        "train/global_step": 3,
        "train/tokens_per_second": 250.0,
        "memory/peak_gib": 2.5,
    }


def test_mfu_where_the_peak_of_the_device_is_known():
    metrics = step_metrics(STEP, epoch=0.25, mfu_per_token_rate=0.001)
    assert metrics["train/mfu"] == pytest.approx(0.25)
