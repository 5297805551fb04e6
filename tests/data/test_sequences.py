"""Sequences of tokens: their labels, bounds, texts and digest."""

import numpy as np

from hqqtrain.data.sequences import IGNORE_INDEX, TokenSequences, plain_text_targets


def sequences(targets: list[int] | None = None) -> TokenSequences:
    """Return three texts of 3, 4 and 2 tokens in two sequences of 5 and 4."""
    stream, starts = np.arange(10, 19, dtype=np.int32), np.array([0, 3, 7])
    mask = plain_text_targets(stream, starts) if targets is None else np.array(targets, bool)
    return TokenSequences(stream, mask, starts, np.array([0, 5]), np.array([5, 9]))


def test_labels_and_positions():
    first, second = sequences()
    assert first["input_ids"].tolist() == [10, 11, 12, 13, 14]
    assert first["labels"].tolist() == [IGNORE_INDEX, 11, 12, IGNORE_INDEX, 14]
    assert first["position_ids"].tolist() == [0, 1, 2, 0, 1]
    assert second["labels"].tolist() == [IGNORE_INDEX, 16, IGNORE_INDEX, 18]
    assert second["position_ids"].tolist() == [0, 1, 0, 1]
    assert sequences().target_token_count == 5
    assert sequences().token_count == 9


def test_bounds_without_a_target_are_left_out():
    data = sequences([0, 0, 1, 0, 0, 0, 1, 1, 0])
    found = data.with_bounds(np.array([0, 2, 3, 6]), np.array([3, 6, 6, 9]))
    # The second has a target only in its first token, which nothing precedes; the third has none.
    assert list(zip(found.begin.tolist(), found.end.tolist(), strict=True)) == [(0, 3), (6, 9)]


def test_texts_are_split_and_single_tokens_left_out():
    texts = sequences().split_texts()
    assert list(zip(texts.begin.tolist(), texts.end.tolist(), strict=True)) == [
        (0, 3), (3, 5), (5, 7), (7, 9),
    ]  # fmt: skip
    assert len(sequences().select([1]).split_texts()) == 2


def test_the_digest_depends_on_the_targets_unless_they_are_those_of_plain_text():
    plain = sequences()
    assert plain.is_plain_text
    masked = sequences([0, 1, 1, 0, 1, 1, 0, 0, 1])
    assert not masked.is_plain_text
    assert masked.digest != plain.digest
    assert sequences().digest == plain.digest
