"""Hash the words of texts, and count in how many training texts each n-gram of words is.

Words are compared without case, punctuation, white space and the Unicode form of letters, so that
small changes of a text leave most of its n-grams as they are. Only the n-grams of the held-out text
are in memory. The training text is streamed past them.
"""

import re
import unicodedata
from collections.abc import Sequence
from itertools import islice

import numpy as np

NGRAM_WORDS = 8
"""Words of an n-gram: the shortest of GPT-3, which takes 8 to 13, because rows may be short."""

BLOCK_WORDS = 1 << 20
"""Words whose n-grams are in memory at a time."""

_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
"""Letters of scripts without spaces between words (Thai, Chinese, ...): each counts as a word."""

_WORD = re.compile(rf"[^\W{_UNSPACED}]+|[{_UNSPACED}]")
_GAP = re.compile(r"\s")
_PIECE_CHARACTERS = 1 << 20
_FILTER_BITS = 22
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def word_hashes(text: str) -> np.ndarray:
    """Return a hash of each word of a text in this process, uint64 [words].

    Case, punctuation, white space and the Unicode form of letters do not matter.
    """
    parts, start = [], 0
    while start < len(text):  # in pieces, because a list of words takes 60 bytes for each
        gap = _GAP.search(text, start + _PIECE_CHARACTERS)
        end = gap.start() if gap else len(text)
        folded = unicodedata.normalize("NFKC", text[start:end]).lower()
        parts.append(np.fromiter(map(hash, _WORD.findall(folded)), np.int64))
        start = end
    return np.concatenate([np.empty(0, np.int64), *parts]).view(np.uint64)


def word_position(text: str, word: int) -> int:
    """Return the position of a word in a text; about that, if compatibility forms are in it."""
    found = next(islice(_WORD.finditer(text), word, None), None)
    return found.start() if found else 0


class NgramCounts:
    """Counts in how many distinct training texts each n-gram of the held-out text is.

    Args:
        words: The hashes of all held-out words in order.

    Attributes:
        texts: Number of training texts.
    """

    def __init__(self, words: np.ndarray) -> None:
        self._ngrams, self._positions = np.unique(_ngrams(words), return_inverse=True)
        self._counts = np.zeros(len(self._ngrams), np.int64)
        # Most n-grams are not in the held-out text, and a look at one of these bits shows it.
        self._filter = np.zeros(1 << _FILTER_BITS, bool)
        self._filter[_filter_index(self._ngrams)] = True
        self._counted: set[int] = set()
        self.texts = 0

    def add(self, keys: Sequence[int], block: Sequence[np.ndarray]) -> None:
        """Count the n-grams of training texts; a text that was counted before is left out."""
        self.texts += len(block)
        words = np.concatenate([np.empty(0, np.uint64), *block])
        if not len(words) or not len(self._ngrams):
            return
        text_of_word = np.repeat(np.arange(len(block)), [len(text) for text in block])
        pairs = []
        for start in range(0, len(words), BLOCK_WORDS):
            ngrams = _ngrams(words[start : start + BLOCK_WORDS + NGRAM_WORDS - 1])
            candidates = np.flatnonzero(self._filter[_filter_index(ngrams)])
            places = np.searchsorted(self._ngrams, ngrams[candidates])
            places[places == len(self._ngrams)] = 0
            is_found = self._ngrams[places] == ngrams[candidates]
            texts = text_of_word[start + candidates[is_found]]
            pairs.append(texts * len(self._ngrams) + places[is_found])
        texts, places = np.divmod(np.unique(np.concatenate(pairs)), len(self._ngrams))
        is_new = np.zeros(len(block), bool)
        for text in np.unique(texts):
            is_new[text] = keys[text] not in self._counted
            self._counted.add(keys[text])
        np.add.at(self._counts, places[is_new[texts]], 1)

    def at_words(self) -> np.ndarray:
        """Return the count of the n-gram at every held-out word but the last ones, int64."""
        return self._counts[self._positions]


def _ngrams(words: np.ndarray) -> np.ndarray:
    """Return the hash of the n-gram at every word but the last ones, uint64."""
    count = max(len(words) - NGRAM_WORDS + 1, 0)
    hashes = np.zeros(count, np.uint64)
    for offset in range(NGRAM_WORDS):
        hashes *= _MULTIPLIER  # modulo 2^64
        hashes += words[offset : offset + count]
    return hashes


def _filter_index(ngrams: np.ndarray) -> np.ndarray:
    return ngrams >> np.uint64(64 - _FILTER_BITS)
