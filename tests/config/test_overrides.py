"""The settings of single layers are checked like the keys that they override."""

import pytest

from hqqtrain.config.quant import QuantConfig


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
