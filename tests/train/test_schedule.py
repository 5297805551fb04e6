"""Learning-rate schedules: the warm-up, the decay, and a warning when the peak is not reached."""

import logging

import pytest

from hqqtrain.config.groups import OptimConfig
from hqqtrain.train.schedule import LearningRateSchedule


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
    assert ("never reaches optim.lr" in caplog.text) is warns
