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
from hqqtrain.data.held_out import is_blank
from hqqtrain.data.ngrams import BLOCK_WORDS, NGRAM_WORDS, NgramCounts, word_hashes

logger = logging.getLogger(__name__)

MAX_NGRAM_TEXTS = 10
"""An n-gram in more training texts than this is boilerplate, such as a license or a template.

NVIDIA's NeMo Curator, which follows GPT-3, has the same limit (`max_matches`).
"""

PASSAGE_WORDS = 512
"""Long texts are compared in passages of about this many words."""

MIN_SHARED = 0.5
"""A passage is shared if at least this share of its words is, as in Cosmopedia's decontamination.

So a license of up to 250 words at the top of a file is no overlap, however few files have it.
"""

MAX_OVERLAP = 0.05
"""Largest share of the held-out characters that may also be in the training text, with a warning.

Independent texts share headings and empty forms: below this share the perplexity is still valid.
"""


@dataclass(frozen=True)
class Overlap:
    """The part of the held-out text that is also trained on.

    Attributes:
        shared_texts: Number of distinct held-out texts that share a passage.
        texts: Number of distinct held-out texts.
        share: Share of the held-out characters, from 0 to 1.
        example: The beginning of the text that shares most; '' if none does.
    """

    shared_texts: int
    texts: int
    share: float
    example: str


def check_overlap(
    train: Iterable[str], held_out: Iterable[str], where: str, fix: str | None
) -> None:
    """Refuse held-out texts that are also trained on; warn if they are few.

    Args:
        train: The texts to train on.
        held_out: The held-out texts.
        where: The two sources, for messages.
        fix: Further advice for the error message; None: any overlap is a warning only.

    Raises:
        UserError: More than `MAX_OVERLAP` of the held-out characters are also trained on.
    """
    overlap = measure_overlap(train, held_out)
    if not overlap.shared_texts:
        return
    message = (
        f"{where}: {overlap.shared_texts} of {overlap.texts} held-out texts, with "
        f"{overlap.share:.1%} of the characters, overlaps with the training text, such as "
        f"{overlap.example!r}"
    )
    if overlap.share <= MAX_OVERLAP:
        logger.warning("%s; the perplexity is slightly too good.", message)
    elif fix is None:
        logger.warning("%s; the perplexity is too good. Remove near copies from it.", message)
    else:
        raise UserError(
            f"{message}. The model would train on held-out text; remove these texts from one of "
            f"the two{fix}."
        )


def measure_overlap(train: Iterable[str], held_out: Iterable[str]) -> Overlap:
    """Return how much of the held-out text is in the training text.

    A held-out text is shared completely if a training text is equal to it. Otherwise those of its
    passages are shared of which at least half is in n-grams of the training text. Words in
    boilerplate count on neither side. N-grams also cross the ends of texts, so that lines in rows
    of their own are found in one text.
    """
    texts: dict[int, tuple[int, str, np.ndarray]] = {}
    for text in held_out:
        if not is_blank(text):
            hashes = word_hashes(text)
            texts.setdefault(_key(text, hashes), (len(text), text[:60], hashes))
    if not texts:
        return Overlap(0, 0, 0.0, "")
    words = [hashes for _, _, hashes in texts.values()]
    counts = NgramCounts(np.concatenate(words))
    equal: set[int] = set()
    for keys, block in _blocks(train):
        equal.update(key for key in keys if key in texts)
        counts.add(keys, block)
    shares = _shares_of_texts(words, counts.at_words(), counts.texts)
    shares[[key in equal for key in texts]] = 1.0
    sizes = np.array([size for size, _, _ in texts.values()])
    example = list(texts.values())[int(np.argmax(shares * sizes))][1] if shares.any() else ""
    return Overlap(
        int(np.count_nonzero(shares)), len(texts), float(shares @ sizes / sizes.sum()), example
    )


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


def _shares_of_texts(texts: list[np.ndarray], counts: np.ndarray, train_texts: int) -> np.ndarray:
    """Return the share of each text's words that are in shared passages, float [texts].

    Args:
        texts: The words of each held-out text.
        counts: In how many training texts the n-gram at a word is, int64 [n-grams].
        train_texts: Number of training texts.
    """
    lengths = np.array([len(text) for text in texts])
    passages = np.maximum(1, lengths // PASSAGE_WORDS)
    starts = np.cumsum(lengths) - lengths
    begin = np.concatenate(
        [
            start + np.arange(count) * length // count
            for start, length, count in zip(starts, lengths, passages, strict=True)
        ]
    )
    end = np.append(begin[1:], lengths.sum())
    is_common = counts > MAX_NGRAM_TEXTS
    is_in_most = is_common | ((counts >= 3) & (2 * counts > train_texts))
    # In a small set, boilerplate is what most texts have, unless it is nearly all of a passage.
    is_shared = _are_shared(begin, end, counts, is_in_most, MIN_SHARED)
    is_shared |= _are_shared(begin, end, counts, is_common, 0.9)
    text_of_passage = np.repeat(np.arange(len(texts)), passages)
    shared_words = np.bincount(text_of_passage, (end - begin) * is_shared, len(texts))
    return shared_words / np.maximum(lengths, 1)


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
