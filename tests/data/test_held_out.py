"""Held-out texts by content: a share by hash, whatever the order, and no text in both parts."""

import random

import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.data.held_out import split_by_hash, text_hash

TEXTS = [f"text number {i}" for i in range(100)]


@pytest.mark.parametrize(
    ("share", "count"), [(0.02, 2), (0.021, 3), (0.29, 29), (0.001, 1), (0.99, 99)]
)
def test_the_share_is_exact_and_at_least_one(share, count):
    train, held_out = split_by_hash(TEXTS, share, "data.source=x")
    assert len(list(held_out)) == count
    assert [text for text in TEXTS if text not in set(held_out)] == list(train)


def test_the_split_depends_on_the_content_alone():
    _, held_out = split_by_hash(TEXTS, 0.1, "")
    shuffled = random.Random(0).sample(TEXTS, len(TEXTS))
    _, again = split_by_hash([f"  {text}\r\n" for text in shuffled] + ["", " "], 0.1, "")
    assert {text.strip() for text in again} == set(held_out)


def test_too_few_texts_are_refused_and_two_are_enough():
    for texts in (["only one line"], ["the same", "the same "], ["x", ""]):
        with pytest.raises(UserError, match="cannot be split"):
            split_by_hash(texts, 0.02, "data.source=x")
    train, held_out = split_by_hash(["one", "two"], 0.02, "")
    assert sorted([*train, *held_out]) == ["one", "two"]
    train, held_out = split_by_hash(["one\ntwo"], 0.02, "")
    assert (train, held_out) == (["one\n"], ["two"])
    with pytest.raises(UserError, match="all would be held out"):
        split_by_hash(TEXTS[:3], 0.9, "data.source=x")


def test_the_split_is_logged(caplog):
    caplog.set_level("INFO", logger="hqqtrain")
    split_by_hash(TEXTS, 0.02, "data.source=x")
    assert "data.source=x: 2 of 100 texts are held out by their hashes (data.validation=0.02)" in (
        caplog.text
    )


def test_equal_up_to_white_space():
    assert text_hash(" a\r\n\tb ") == text_hash("a b") != text_hash("ab")
