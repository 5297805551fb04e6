"""The settings of single layers, and what the choices of `parallel.offload` cover."""

from dataclasses import asdict, fields, is_dataclass

import pytest

from hqqtrain.config import groups
from hqqtrain.config.field import field_errors
from hqqtrain.config.groups import ParallelConfig, QuantConfig


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (3, "quant.overrides[*.q_proj]=3: must be null or settings"),
        ({"nbits": 5}, "quant.overrides[*.q_proj].nbits=5: allowed are 8, 4, 3, 2, 1."),
        ({"nbits": True}, "quant.overrides[*.q_proj].nbits=True"),
        ({"bits": 4}, "quant.overrides[*.q_proj].bits: unknown; allowed are nbits, axis"),
        ({"group_size": 1}, "quant.overrides[*.q_proj].group_size=1: must be null or an integer"),
        ({"group_size": "64"}, "quant.overrides[*.q_proj].group_size=64: must be null or"),
    ],
)
def test_overrides_are_checked_like_the_keys_they_override(settings, expected):
    (message,) = QuantConfig(overrides={"*.q_proj": settings}).errors()
    assert expected in message


@pytest.mark.parametrize("settings", [None, {}, {"nbits": 8, "group_size": None, "axis": 0}])
def test_sound_overrides_pass(settings):
    assert list(QuantConfig(overrides={"*.q_proj": settings}).errors()) == []


def test_every_wrong_override_has_its_own_message():
    overrides = {"a": 1, "b": {"nbits": 0, "axis": 3, "solver": "x"}, "c": None}
    assert len(list(QuantConfig(overrides=overrides).errors())) == 4


@pytest.mark.parametrize(
    ("offload", "activations", "parameters"),
    [
        ("none", False, False),
        ("activations", True, False),
        ("parameters", False, True),
        ("all", True, True),
    ],
)
def test_offload_covers_what_its_name_says(offload, activations, parameters):
    config = ParallelConfig(offload=offload)
    assert list(field_errors("parallel", config)) == []
    assert (config.offloads_activations, config.offloads_parameters) == (activations, parameters)


def test_every_group_has_sound_defaults_and_a_help_text_for_every_key():
    classes = [item for item in vars(groups).values() if is_dataclass(item)]
    assert len(classes) > 5
    for group in classes:
        assert group.__doc__
        assert list(field_errors("group", group())) == []
        for item in fields(group):
            assert item.metadata["help"], item.name


def test_defaults_of_lists_and_dicts_are_not_shared():
    first, second = QuantConfig(), QuantConfig()
    first.skip.append("x")
    first.overrides["x"] = None
    assert asdict(second) == asdict(QuantConfig())
