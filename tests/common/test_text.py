"""Numbers and names in messages."""

import pytest

from hqqtrain.common.text import count, escape_terminal, format_bytes, short


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


@pytest.mark.parametrize(
    ("size", "text"),
    [(3 << 29, "1.50 GiB"), (1 << 27, "0.12 GiB"), (50 << 20, "50.00 MiB"), (1 << 15, "0.031 MiB")],
)
def test_a_size_has_a_unit_that_fits(size, text):
    assert format_bytes(size) == text


def test_only_characters_that_steer_a_terminal_are_escaped():
    assert escape_terminal("a\x1b[31m\r\u202eb\x9b\0") == r"a\x1b[31m\r\u202eb\x9b\x00"
    for text in ("two\n\tlines", "größe 状態 \N{GRINNING FACE}", r"C:\x1b \d"):
        assert escape_terminal(text) == text
