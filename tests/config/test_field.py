"""A key is declared once: default, help, allowed values; the messages follow."""

import math
from dataclasses import dataclass, fields
from typing import Any

import pytest

from hqqtrain.config.field import field_errors, key


@dataclass
class Group:
    mode: str | None = key("a", "how", choices=("a", "b", None))
    count: int | None = key(1, "how many", low=1)
    rate: float = key(0.5, "how fast", low=0)
    names: list = key(help="which", factory=lambda: ["x"])
    text: str | None = key(None, "where")


def _errors(**values: Any) -> list[str]:
    return list(field_errors("group", Group(**values)))


def test_a_key_carries_its_help_and_limits():
    mode, count, _, names, _ = fields(Group)
    limits = {"low": None, "high": None}
    assert mode.metadata == {"help": "how", "choices": ("a", "b", None), **limits}
    assert (count.default, count.metadata["low"]) == (1, 1)
    assert names.default_factory() == ["x"]
    assert Group().names is not Group().names


def test_defaults_and_allowed_values_pass():
    assert _errors() == []
    assert _errors(mode=None, count=None, rate=0.0) == []
    assert _errors(count=10**30, rate=1e308) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "c"}, "group.mode=c: allowed are a, b, null."),
        ({"mode": ""}, "group.mode=: allowed are a, b, null."),
        ({"count": 0}, "group.count=0: must be at least 1."),
        ({"rate": -1e-9}, "group.rate=-1e-09: must be at least 0."),
        ({"rate": math.nan}, "group.rate=nan: must be finite."),
        ({"rate": math.inf}, "group.rate=inf: must be finite."),
        ({"rate": -math.inf}, "group.rate=-inf: must be finite."),
        ({"text": "None"}, "group.text=None: use null for none."),
    ],
)
def test_another_value_gives_one_message_with_key_value_and_limit(values, message):
    assert _errors(**values) == [message]


def test_all_errors_are_reported_in_the_order_of_the_keys():
    assert [text.split("=")[0] for text in _errors(rate=-1.0, mode="c", count=0)] == [
        "group.mode", "group.count", "group.rate",
    ]  # fmt: skip


def test_null_is_refused_where_it_is_no_choice():
    @dataclass
    class Other:
        axis: int | None = key(1, "axis", choices=(0, 1))

    assert list(field_errors("quant", Other(None))) == ["quant.axis=null: allowed are 0, 1."]


def test_a_string_with_a_nul_is_no_path():
    @dataclass
    class Paths:
        path: str | None = key(None, "a file")

    (message,) = field_errors("group", Paths("a\0b"))
    assert message == r"group.path='a\x00b': must not contain a NUL character."
