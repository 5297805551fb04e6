"""The only column of text is found without `data.text_field`, if it cannot be another one."""

import pytest

from hqqtrain.data.formats.text import only_text_column, text_format
from hqqtrain.data.rows import RowError


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"content": "a"}], "content"), ([{"Text": "a", "n": 1}], "Text"),
        ([{"document": "a", "id": "17"}, {"document": None, "id": "2.5"}], "document"),
        ([{"content": "a", "note": None}, {"content": "b", "note": " "}], "content"),
        ([{"content": "a", "id": "x"}], None), ([{"content": "a"}, {"document": "b"}], None),
        ([{"body": "a"}], None), ([{"content": 5}], None), ([{"content": ["a"]}], None), ([], None),
    ],
)  # fmt: skip
def test_the_only_column_of_text(rows, expected):
    assert only_text_column(rows) == expected


def test_text_is_read_as_it_is():
    parse = text_format("body").parse
    assert parse({"body": " a\r\n", "text": "b"}) == " a\r\n"
    assert parse({"body": None}) is parse({"text": "b"}) is None
    with pytest.raises(RowError, match=r"data\.text_field=body is binary, not text: b'a'"):
        parse({"body": b"a"})
