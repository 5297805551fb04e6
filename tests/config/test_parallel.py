"""The group parallel: the parts that offload covers."""

import pytest

from hqqtrain.config.parallel import ParallelConfig


@pytest.mark.parametrize(
    ("offload", "activations", "parameters"),
    [
        ("none", False, False),
        ("activations", True, False),
        ("parameters", False, True),
        ("all", True, True),
    ],
)
def test_what_is_offloaded(offload: str, activations: bool, parameters: bool):
    config = ParallelConfig(offload=offload)
    assert config.offloads_activations is activations
    assert config.offloads_parameters is parameters
