"""Messages of the Python functions name arguments, and values as Python has them."""

from pathlib import Path

import pytest

from hqqtrain.api.arguments import checked_group, named_as_arguments
from hqqtrain.common.errors import UserError
from hqqtrain.config.adapter import AdapterConfig
from hqqtrain.config.groups import DataConfig


@pytest.mark.parametrize(("message", "expected"), [
    ("quant.group_size=7: or null.", "group_size=7: or None."),
    ("quant.overrides[*.o_proj].nbits=5: x", "overrides[*.o_proj].nbits=5: x"),
    ("train.global_batch_size=0: true", "batch_size=0: True"),
    ("HqqTrainConfig.nbits=5", "nbits=5"),
    ("HqqTrainConfig: x is no setting", "x is no setting"),
    ("data.source=/tmp/data.source/train.jsonl: no", "source=/tmp/data.source/train.jsonl: no"),
    ("model.layers.0.q_proj has nullable", "model.layers.0.q_proj has nullable"),
])  # fmt: skip
def test_keys_become_arguments(message: str, expected: str):
    with (
        pytest.raises(UserError) as caught,
        named_as_arguments("f", batch_size="train.global_batch_size"),
    ):
        raise UserError(message)
    assert str(caught.value) == f"f: {expected}"


def test_tuples_and_paths_are_taken():
    assert checked_group(DataConfig, "data", {"source": Path("a.txt")}).source == "a.txt"
    assert checked_group(AdapterConfig, "adapter", {"target_modules": ("a",)}).target_modules == [
        "a"
    ]


@pytest.mark.parametrize("values", [{"r": 0}, {"r": "x"}, {"target_modules": []}])
def test_values_are_checked(values: dict):
    with pytest.raises(UserError, match=rf"adapter\.{next(iter(values))}="):
        checked_group(AdapterConfig, "adapter", values)
