"""The values of train.activation_checkpointing, and those of earlier releases."""

import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.compose.compose import compose_config
from hqqtrain.config.activation_checkpointing import count_recomputed
from hqqtrain.config.groups import TrainConfig


@pytest.mark.parametrize(
    ("word", "value"),
    [("true", "full"), ("false", "none"), ("none", "none"), ("8", 8), ("auto", "auto")],
)
def test_values_of_the_command_line(word, value):
    config = compose_config([f"train.activation_checkpointing={word}"])
    found = config.train.activation_checkpointing
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("value", [0, -1, 2.5, "some", "null", "", [1], None])
def test_other_values_are_refused_with_those_that_are_allowed(value):
    (message,) = TrainConfig(activation_checkpointing=value).errors()
    assert "train.activation_checkpointing=" in message
    assert "allowed are auto, none, full, offload, or a number of layers from 1 on." in message


def test_the_command_line_refuses_other_values():
    with pytest.raises(UserError, match=r"train\.activation_checkpointing=most: allowed are auto"):
        compose_config(["train.activation_checkpointing=most"])


def test_recomputed_layers_are_counted():
    modes = ("none", 3, 40, "auto", "full", "offload")
    assert [count_recomputed(mode, 32) for mode in modes] == [0, 3, 32, 32, 32, 32]
