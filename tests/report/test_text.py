"""Text for people: characters that no file can hold, and numbers."""

import pytest

from hqqtrain.report.text import escape_html, format_number, printable


def test_markup_becomes_text_and_unprintable_characters_are_replaced():
    assert escape_html('<b title="\'">&') == "&lt;b title=&quot;&#x27;&quot;&gt;&amp;"
    assert printable("a\tb\n\x00\x08\x1b\x85\u202e\ud83d\uffff é😀") == "a\tb\n������� é😀"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234567, "1,234,567"), (0, "0"), (-5, "-5"), (0.123456, "0.1235"), (12345.6, "1.235e+04"),
        (float("nan"), "nan"), (True, "True"), (None, "None"), ("1234", "1234"),
    ],
)  # fmt: skip
def test_numbers_are_formatted_for_people(value, text):
    assert format_number(value) == text
