"""Find held-out text that is also trained on, whatever its copies look like.

A perplexity on text that the model was trained on is worthless. As for the benchmarks of GPT-3
(Brown et al. 2020, appendix C), texts are compared by their n-grams of words, without case and
punctuation. So a copy is found whatever its name, its format and its line endings, also if it was
edited, cut into pieces or put together from pieces.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from hqqtrain.common.errors import UserError
from hqqtrain.data.examples import Example
from hqqtrain.data.held_out import ExampleTexts, is_blank
from hqqtrain.data.ngrams import BLOCK_WORDS, NGRAM_WORDS, NgramCounts, word_hashes, word_position

logger = logging.getLogger(__name__)

MAX_NGRAM_TEXTS = 10
"""An n-gram in more training texts than this is boilerplate, such as a license or a template.

NVIDIA's NeMo Curator, which follows GPT-3, has the same limit (`max_matches`).
"""

PASSAGE_WORDS, PASSAGE_STEP = 512, 64
"""A longer text is compared in passages of so many words, which begin so many words apart."""

MIN_SHARED = 0.5
"""A passage is shared if at least this share of its words is, as in Cosmopedia's decontamination.

So a license of up to 250 words at the top of a file is no overlap, however few files have it.
"""

MAX_OVERLAP = 0.05
"""Largest share of the held-out characters that may also be in the training text, with a warning.

Independent texts share headings and empty forms: below this share the perplexity is still valid.
"""

EXAMPLE_CHARACTERS = 60
"""Length of the beginning of shared text that a message shows."""


@dataclass(frozen=True)
class Overlap:
    """The part of the held-out text that is also trained on.

    Attributes:
        shared_texts: Number of distinct held-out texts that share a passage.
        texts: Number of distinct held-out texts.
        share: Share of the held-out characters, from 0 to 1.
        example: The beginning of what is shared of the text that shares most; '' if none does.
    """

    shared_texts: int
    texts: int
    share: float
    example: str


def check_overlap(
    train: Iterable[Example],
    held_out: Iterable[Example],
    where: str,
    fix: str | None,
    *,
    use: str = "training",
) -> None:
    """Refuse held-out texts that are also trained on; warn if they are few.

    Args:
        train: The examples to train on.
        held_out: The held-out examples.
        where: The two sources, for messages.
        fix: Further advice for the error message; None: the two are parts of one source, which are
            never refused, and a small overlap is a line of the log.
        use: The use of the texts of `train`, for messages: `training` or `calibration`.

    Raises:
        UserError: More than `MAX_OVERLAP` of the held-out characters are also trained on.
    """
    overlap = measure_overlap(ExampleTexts(train), ExampleTexts(held_out))
    if not overlap.shared_texts:
        return
    dots = "..." if len(overlap.example) == EXAMPLE_CHARACTERS else ""
    verb = "overlaps" if overlap.shared_texts == 1 else "overlap"
    message = (
        f"{where}: {overlap.shared_texts} of {overlap.texts} held-out texts, with "
        f"{overlap.share:.1%} of the characters, {verb} with the {use} text, such as "
        f"{overlap.example + dots!r}"
    )
    if overlap.share <= MAX_OVERLAP:
        level = logging.INFO if fix is None else logging.WARNING
        logger.log(level, "%s; the perplexity is slightly too good.", message)
    elif fix is None:
        logger.warning(
            "%s; the perplexity is too good. Remove near copies from the source.", message
        )
    else:
        raise UserError(
            f"{message}. The perplexity would be too good; remove these texts from one of the "
            f"two{fix}."
        )


def measure_overlap(train: Iterable[str], held_out: Iterable[str]) -> Overlap:
    """Return how much of the held-out text is in the training text.

    A held-out text is shared completely if a training text is equal to it. Otherwise those of its
    passages are shared of which at least half is in n-grams of the training text. Words in
    boilerplate count on neither side. N-grams also cross the ends of texts, so that lines in rows
    of their own are found in one text.
    """
    texts: dict[int, tuple[int, np.ndarray]] = {}
    for text in held_out:
        if not is_blank(text):
            hashes = word_hashes(text)
            texts.setdefault(_key(text, hashes), (len(text), hashes))
    if not texts:
        return Overlap(0, 0, 0.0, "")
    words = np.concatenate([hashes for _, hashes in texts.values()])
    lengths = np.array([len(hashes) for _, hashes in texts.values()])
    counter = NgramCounts(words)
    equal: set[int] = set()
    for keys, block in _blocks(train):
        equal.update(key for key in keys if key in texts)
        counter.add(keys, block)
    counts = counter.at_words()
    is_shared = _in_shared_passages(lengths, counts, counter.texts)
    text_of_word = np.repeat(np.arange(len(texts)), lengths)
    shares = np.bincount(text_of_word, is_shared, len(texts)) / np.maximum(lengths, 1)
    shares[[key in equal for key in texts]] = 1.0
    sizes = np.array([size for size, _ in texts.values()])
    share = float(shares @ sizes / sizes.sum())
    if not share:
        return Overlap(0, len(texts), 0.0, "")
    largest = int(np.argmax(shares * sizes))
    is_copy = (is_shared & _covered(counts > 0, len(words)))[text_of_word == largest]
    example = _excerpt(
        held_out, list(texts)[largest], int(np.argmax(is_copy)) if len(is_copy) else 0
    )
    return Overlap(int(np.count_nonzero(shares)), len(texts), share, example)


def _excerpt(texts: Iterable[str], key: int, word: int) -> str:
    """Return the beginning of what is shared of the text with a key, from the shared `word` on."""
    texts = (text for text in texts if not is_blank(text))
    text = next(text for text in texts if _key(text, word_hashes(text)) == key)
    start = word_position(text, word) if word else 0
    return text[start : start + EXAMPLE_CHARACTERS]


def _key(text: str, words: np.ndarray) -> int:
    """Return a key that equal texts share; if they are short, their punctuation matters."""
    if len(words) >= NGRAM_WORDS:
        return hash(words.tobytes())
    return hash(" ".join(text.lower().split()))


def _blocks(texts: Iterable[str]) -> Iterator[tuple[list[int], list[np.ndarray]]]:
    """Yield the keys and words of several texts, about `BLOCK_WORDS` words at a time.

    A block begins with the last words of the block before it.
    """
    keys: list[int] = []
    block: list[np.ndarray] = []
    size = 0
    for text in texts:
        if is_blank(text):
            continue
        block.append(word_hashes(text))
        keys.append(_key(text, block[-1]))
        size += len(block[-1])
        if size >= BLOCK_WORDS:
            yield keys, block
            tail = np.concatenate(block[-NGRAM_WORDS:])[1 - NGRAM_WORDS :]
            keys, block, size = [hash(tail.tobytes())], [tail], 0
    yield keys, block


def _in_shared_passages(lengths: np.ndarray, counts: np.ndarray, train_texts: int) -> np.ndarray:
    """Return which held-out words are in shared passages, bool [words].

    Args:
        lengths: Number of words of each held-out text.
        counts: In how many training texts the n-gram at a word is, int64 [n-grams].
        train_texts: Number of training texts.
    """
    begin, end = _passages(lengths)
    is_common = counts > MAX_NGRAM_TEXTS
    is_in_most = is_common | ((counts >= 3) & (2 * counts > train_texts))
    size = int(lengths.sum())
    # In a small set, boilerplate is what most texts have, unless it is nearly all of a passage.
    is_shared = _are_shared(begin, end, counts, is_in_most, MIN_SHARED)
    is_shared |= _are_shared(begin, end, counts, is_common, 0.9)
    begin, end = begin[is_shared], end[is_shared]
    # Passages of a longer text begin and end with what is shared.
    words = np.arange(size)
    has_ngram = _covered(counts > 0, size)
    next_ngram = np.minimum.accumulate(np.where(has_ngram, words, size)[::-1])[::-1]
    last_ngram = np.maximum.accumulate(np.where(has_ngram, words, -1))
    is_part = end - begin >= PASSAGE_WORDS
    begin = np.where(is_part, next_ngram[begin], begin)
    end = np.where(is_part, last_ngram[end - 1] + 1, end)
    changes = np.bincount(begin, minlength=size + 1) - np.bincount(end, minlength=size + 1)
    return np.cumsum(changes)[:-1] > 0


def _passages(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where the passages of all texts begin and end, int64 [passages] each."""
    text_end = np.cumsum(lengths)
    last = np.maximum(lengths - PASSAGE_WORDS, 0)  # where the last passage of a text begins in it
    counts = -(-last // PASSAGE_STEP) + 1
    begin = np.concatenate(
        [
            end - length + np.minimum(np.arange(count) * PASSAGE_STEP, maximum)
            for end, length, count, maximum in zip(text_end, lengths, counts, last, strict=True)
        ]
    )
    return begin, np.minimum(begin + PASSAGE_WORDS, np.repeat(text_end, counts))


def _are_shared(
    begin: np.ndarray,
    end: np.ndarray,
    counts: np.ndarray,
    is_boilerplate: np.ndarray,
    min_share: float,
) -> np.ndarray:
    """Return which passages have at least `min_share` of their words in n-grams of training texts.

    Words in boilerplate are left out, unless they are also in another n-gram.
    """
    has_ngram = _covered((counts > 0) & ~is_boilerplate, end[-1])
    is_counted = has_ngram | ~_covered(is_boilerplate, end[-1])
    found, counted = (
        before[end] - before[begin]
        for before in (np.append(0, np.cumsum(words)) for words in (has_ngram, is_counted))
    )
    return (found > 0) & (found >= min_share * counted)


def _covered(ngrams: np.ndarray, words: int) -> np.ndarray:
    """Return which words are in at least one of the selected n-grams, bool [words]."""
    changes = np.zeros(words + 1, np.int64)
    changes[: len(ngrams)] += ngrams
    changes[NGRAM_WORDS : NGRAM_WORDS + len(ngrams)] -= ngrams
    return np.cumsum(changes)[:-1] > 0
