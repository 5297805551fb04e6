"""Rows of tokens: only what can be trained as it is."""

import pytest

from hqqtrain.data.examples import Tokens
from hqqtrain.data.formats import tokens
from hqqtrain.data.rows import RowError
from hqqtrain.data.sequences import IGNORE_INDEX


def parse(**row: object) -> Tokens:
    found = tokens.match(row)
    assert found is not None
    example = found.parse(row)
    assert isinstance(example, Tokens)
    return example


def test_tokens_and_their_labels():
    assert parse(input_ids=[5, 6, 7], labels=[-100, 6, -100]) == Tokens((5, 6, 7), (-100, 6, -100))
    assert parse(input_ids=[5, 6]) == parse(input_ids=[5, 6], labels=None) == Tokens((5, 6), (5, 6))
    assert parse(input_ids="[5, 6]", labels="[-100, 6]") == Tokens((5, 6), (-100, 6))  # of a CSV
    whole = parse(input_ids=[5, 6], attention_mask=[1, 1], position_ids=[0, 1])
    assert whole == Tokens((5, 6), (5, 6))
    assert tokens.IGNORE_INDEX == IGNORE_INDEX


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"input_ids": None}, "input_ids is null, not a list of integers"),
        ({"input_ids": []}, "input_ids is an empty list"), ({"input_ids": 5}, "is a number, not"),
        ({"input_ids": "5 6"}, "not JSON"), ({"input_ids": [[5, 6]]}, "input_ids[0] is a list"),
        ({"input_ids": [5, 6.0, 7]}, "input_ids[1] is a number, not an integer: 6.0"),
        ({"input_ids": [5, True, 7]}, "input_ids[1] is a boolean"),
        ({"input_ids": [5, None, 7]}, "input_ids[1] is null"),
        ({"input_ids": [5, -1, 7]}, "input_ids[1] is -1, which is not a token id"),
        ({"input_ids": [5, 2**31, 7]}, "which is not a token id"),
        ({"labels": [5, 6]}, "labels has 2 values, but input_ids has 3"),
        ({"labels": [6, 7, -100]}, "labels[0] is 6, but input_ids[0] is 5; a label is -100 or"),
        ({"attention_mask": [1, 1, 0]}, "attention_mask is not 1 everywhere; remove the padding"),
        ({"attention_mask": [1]}, "attention_mask has 1 values"),
        ({"position_ids": [0, 1, 0]}, "position_ids does not count from 0"),
    ],
)  # fmt: skip
def test_bad_rows_are_named(change, reason):
    with pytest.raises(RowError) as caught:
        parse(**{"input_ids": [5, 6, 7], **change})
    assert reason in str(caught.value)


def test_the_columns():
    assert tokens.match(["labels", "text"]) is None
