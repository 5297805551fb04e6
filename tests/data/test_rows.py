"""Values of rows in messages."""

from hqqtrain.data.rows import quote


def test_a_value_is_quoted_and_cut():
    assert quote("a\nb") == "'a\\nb'"
    assert quote({"a": 1}) == "{'a': 1}"
    assert quote("x" * 100, 10) == "'xxxxxxxxx..."
    assert len(quote(list(range(1000)))) == 63
