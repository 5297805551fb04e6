"""N-grams are counted as a dictionary of them would, whatever the size of a block."""

import random
from collections import Counter

import numpy as np
import pytest

from hqqtrain.data import ngrams
from hqqtrain.data.ngrams import NGRAM_WORDS, NgramCounts, word_hashes, word_position

EQUAL = [
    ("The quick, brown fox.", "the QUICK brown\r\n\tfox"),
    (
        "na\u00efve \ufb01le",
        "nai\u0308ve file",
    ),  # composed and ligature, decomposed and two letters
    ("\u6771\u4eac\u90fd", "\u6771 \u4eac\u3001\u90fd"),  # a script without spaces
]


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_equal_words_have_equal_hashes(one: str, other: str) -> None:
    assert len(word_hashes(one)) > 1
    assert np.array_equal(word_hashes(one), word_hashes(other))
    assert not np.array_equal(word_hashes(one), word_hashes(f"{other} more"))


@pytest.mark.parametrize("text", ["", " \n", "...!"])
def test_a_text_without_words_has_no_hashes(text: str) -> None:
    assert word_hashes(text).shape == (0,)


def test_pieces_are_cut_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(f"word{i}" for i in range(300))
    whole = word_hashes(text)
    for size in (1, 7, 100):
        monkeypatch.setattr(ngrams, "_PIECE_CHARACTERS", size)
        assert np.array_equal(word_hashes(text), whole)


def test_the_position_of_a_word() -> None:
    assert word_position("one, two three", 2) == 9
    assert word_position("one", 5) == 0


@pytest.mark.parametrize("block_words", [1, 13, 1 << 20])
def test_counts_are_those_of_a_dictionary(block_words: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ngrams, "BLOCK_WORDS", block_words)
    chosen = random.Random(0)
    texts = [[chosen.choice("ab") for _ in range(chosen.randrange(60))] for _ in range(30)]
    held_out = [chosen.choice("ab") for _ in range(200)]
    expected = Counter(gram for text in {tuple(t) for t in texts} for gram in set(_grams([*text])))
    counter = NgramCounts(word_hashes(" ".join(held_out)))
    for text in [*texts, *texts]:  # equal texts count once
        words = word_hashes(" ".join(text))
        counter.add([hash(words.tobytes())], [words])
    assert counter.at_words().tolist() == [expected[gram] for gram in _grams(held_out)]
    assert counter.texts == 2 * len(texts)


def _grams(words: list[str]) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + NGRAM_WORDS]) for i in range(len(words) - NGRAM_WORDS + 1)]
