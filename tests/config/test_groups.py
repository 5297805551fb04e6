"""Groups have sound defaults, help texts for all keys, and copies that are independent."""

from dataclasses import asdict, fields, is_dataclass

from hqqtrain.config import adapter, groups, model
from hqqtrain.config.field import field_errors
from hqqtrain.config.quant import QuantConfig


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
