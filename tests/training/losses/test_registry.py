"""Every value of `train.objective` has a loss."""

from dataclasses import fields

from hqqtrain.config.groups import TrainConfig
from hqqtrain.training.losses.registry import LOSSES


def test_objectives_and_losses_are_the_same():
    (objective,) = (field for field in fields(TrainConfig) if field.name == "objective")
    assert set(LOSSES) == set(objective.metadata["choices"])
