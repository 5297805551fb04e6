"""Changes are tried, and shown if they save memory."""

import pytest
from plans import new_predictor, planned_config

from hqqtrain.tasks.plan_changes import try_changes, with_settings
from hqqtrain.tasks.prediction import Predictor


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return new_predictor()


def test_what_helps_is_planned_with_the_change(predictor: Predictor):
    config = planned_config("0.92GiB")
    plan = predictor.predict(config)
    assert not plan.fits
    changes = {str(change): change.prediction for change in try_changes(predictor, plan)}
    assert "train.micro_batch_size=2" in changes
    for prediction in changes.values():
        assert prediction.needed < plan.needed
    smaller = changes["train.micro_batch_size=2"]
    config.train.micro_batch_size = 2
    assert smaller.memory == predictor.predict(config).memory
    assert any(prediction.fits for prediction in changes.values())


def test_changes_are_combined_if_none_is_enough(predictor: Predictor):
    plan = predictor.predict(planned_config("0.87GiB"))
    *single, combined = try_changes(predictor, plan)
    assert not any(change.prediction.fits for change in single)
    assert len(combined.settings) > 1
    assert combined.prediction.needed < min(
        change.prediction.needed for change in single if "plan.gpus" not in change.settings
    )


def test_settings_are_changed_in_a_copy():
    config = planned_config()
    changed = with_settings(config, {"train.micro_batch_size": 1, "quant.calibration": None})
    assert (changed.train.micro_batch_size, changed.quant.calibration) == (1, None)
    assert config.train.micro_batch_size == 4
