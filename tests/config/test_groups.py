"""The choices of `parallel.offload` cover what they name, and copies of groups are independent."""

from dataclasses import asdict, fields, is_dataclass

import pytest

from hqqtrain.config import adapter, groups, model
from hqqtrain.config.field import field_errors
from hqqtrain.config.parallel import ParallelConfig
from hqqtrain.config.quant import QuantConfig


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
    items = {**vars(groups), **vars(adapter), **vars(model)}.values()
    classes = [item for item in items if is_dataclass(item)]
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
