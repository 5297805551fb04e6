"""The text of a plan has what it needs, how fast it is, and what to change."""

import pytest
from plans import new_predictor, planned_config

from hqqtrain.tasks.plan_changes import Change
from hqqtrain.tasks.plan_text import render_plan
from hqqtrain.tasks.prediction import Predictor


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return new_predictor()


def test_a_plan_that_fits(predictor: Predictor):
    text = render_plan(predictor.predict(planned_config()))
    assert "1 x H100, parallel.strategy=single, bf16; micro-batches of 4 x 256 tokens" in text
    assert "0 of 6 decoder layers recompute" in text
    assert "codes 0.00" in text
    assert "of 78.15: fits" in text
    assert "a step on H100" in text
    assert "100 steps of 2,048 tokens take" in text
    assert "MFU" in text
    assert "quantized/" in text


def test_all_gpus_of_a_size_are_listed_with_the_time_of_1000_steps(predictor: Predictor):
    config = planned_config("24GB")
    config.train.max_steps = None
    text = render_plan(predictor.predict(config))
    assert "RTX 4090" in text
    assert "1,000 steps of 2,048 tokens take" in text


def test_a_machine_of_unknown_speed_and_what_helps(predictor: Predictor):
    plan = predictor.predict(planned_config("0.9GiB"))
    change = Change({"quant.calibration": None, "train.micro_batch_size": 1}, plan)
    text = render_plan(plan, [change])
    assert "The speed of this machine is not known" in text
    assert "quant.calibration=null train.micro_batch_size=1" in text
    assert "does not fit" in text
