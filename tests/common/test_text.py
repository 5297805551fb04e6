"""Numbers in messages."""

import pytest

from hqqtrain.common.text import count, short


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [(0, "step", "0 steps"), (1, "step", "1 step"), (2, "step", "2 steps"),
     (1, "process", "1 process"), (2, "process", "2 processes"), (1234, "token", "1,234 tokens")],
)  # fmt: skip
def test_a_noun_agrees_with_its_number(number, noun, text):
    assert count(number, noun) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(2.0, "2.00"), (0.1, "0.10"), (0.0042, "0.0042"), (1e-5, "1e-05"), (0, "0")],
)
def test_a_small_number_is_not_rounded_to_zero(number, text):
    assert short(number) == text
