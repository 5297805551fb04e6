"""Plain values become the fields of a config group, or are refused with their types in words."""

import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.config.groups import OptimConfig
from hqqtrain.config.quant import QuantConfig
from hqqtrain.config.typed_group import build_group


def test_values_get_the_types_of_their_fields():
    config = build_group(QuantConfig, {"nbits": 2, "group_size": "32", "calibration": None}, "q")
    assert (config.nbits, config.group_size, config.skip) == (2, 32, ["lm_head"])
    assert type(build_group(OptimConfig, {"lr": 1}, "optim").lr) is float


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("nbits", True, "an integer or null"),
        ("nbits", 4.0, "an integer or null"),
        ("group_size", "many", "an integer or null"),
        ("axis", None, "an integer"),
        ("solver", 3, "a string"),
        ("skip", "q_proj", "a list of strings"),
        ("skip", [5], "a list of strings"),
        ("overrides", None, "a mapping"),
        ("save", 1, "true or false"),
    ],
)
def test_other_types_are_refused(key, value, words):
    with pytest.raises(UserError) as caught:
        build_group(QuantConfig, {key: value, "backend": []}, "here")
    shown = "null" if value is None else value
    assert str(caught.value).splitlines() == [
        f"here.{key}={shown}: must be {words}.", "here.backend=[]: must be a string.",
    ]  # fmt: skip
