"""Figures of tokenized data: counts, lengths, duplicates and a histogram, for task=data.

They are computed from the arrays of `TokenSequences` alone, so they hold for every kind of example,
with and without packing.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from hqqtrain.data.sequences import count_slices

if TYPE_CHECKING:
    from hqqtrain.data.mixture import SourceUse
    from hqqtrain.data.sequences import TokenSequences

MAX_BARS = 12
"""Largest number of bars in a histogram."""

_LOG_RANGE = 10
"""A histogram has bars of equal ratios if its largest value is this many times the smallest."""


@dataclass(frozen=True)
class DataStatistics:
    """Figures of the examples in a data set, and of the sequences that they are trained in.

    Attributes:
        examples: Number of examples.
        tokens: Number of tokens in all sequences.
        trained_tokens: Number of tokens that the loss predicts.
        sequences: Number of sequences.
        padding: Share of the positions that sequences of the largest length leave free.
        truncated: Number of examples that lose some of their tokens, which are in no sequence.
        dropped: Number of examples that are in no sequence at all.
        split: Number of examples that are trained on in several parts.
        untrained: Number of examples without a trained token.
        duplicates: Number of examples that have the same tokens as an earlier one.
        lengths: `min`, `median`, `p95` and `max` of the tokens per example. 95 % of the examples
            have at most `p95` tokens.
        histogram: [smallest length, largest length, examples] of each bar.
    """

    examples: int
    tokens: int
    trained_tokens: int
    sequences: int
    padding: float
    truncated: int
    dropped: int
    split: int
    untrained: int
    duplicates: int
    lengths: dict[str, int]
    histogram: list[list[int]]


@dataclass(frozen=True)
class DataReport:
    """The data of a run, as task=data shows them.

    Attributes:
        statistics: The figures of the examples.
        left_out: Reason -> number of rows that became no example.
        empty_answers: Number of rows of which only the end of an answer is trained.
        held_out: `examples`, `tokens` and `measured_tokens` of the held-out text, if there is any.
        uses: How an epoch uses each source, if there are several.
    """

    statistics: DataStatistics
    left_out: Mapping[str, int] = field(default_factory=dict)
    empty_answers: int = 0
    held_out: Mapping[str, int] | None = None
    uses: "Sequence[SourceUse]" = ()


def measure_data(
    parts: "TokenSequences", packed: "TokenSequences", max_seq_len: int
) -> DataStatistics:
    """Return the figures of examples.

    Args:
        parts: All tokens of the examples, and the parts that are trained on as sequences.
        packed: The sequences that these parts share.
        max_seq_len: The largest length of a sequence.
    """
    starts, ends = parts.starts, example_ends(parts)
    lengths = ends - starts
    kept, trained = (
        count_slices(lambda *part, i=index: token_masks(parts, *part)[i], starts, ends)
        for index in range(2)
    )
    tokens = int((parts.end - parts.begin).sum())
    smallest, median, p95, largest = np.quantile(
        lengths, (0, 0.5, 0.95, 1), method="inverted_cdf"
    ).tolist()
    return DataStatistics(
        examples=len(starts),
        tokens=tokens,
        trained_tokens=int(trained.sum()),
        sequences=len(packed),
        padding=1 - tokens / (len(packed) * max_seq_len),
        truncated=int(np.count_nonzero((kept > 0) & (kept < lengths))),
        dropped=int(np.count_nonzero(kept == 0)),
        split=int(np.count_nonzero(count_parts(parts) > 1)),
        untrained=int(np.count_nonzero(trained == 0)),
        duplicates=count_duplicates(parts),
        lengths={"min": smallest, "median": median, "p95": p95, "max": largest},
        histogram=histogram(lengths),
    )


def example_ends(data: "TokenSequences") -> np.ndarray:
    """Return int64 [examples]: the position in the stream after each example."""
    return np.append(data.starts[1:], len(data.stream))


def token_masks(data: "TokenSequences", first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Return two masks of a part of the stream, bool [last - first].

    The first says which tokens are in a sequence, the second which of them the loss predicts. The
    first token of a sequence is never predicted.
    """
    near = (data.begin < last) & (data.end > first)
    begin, end = data.begin[near], data.end[near]
    changes = np.zeros(last - first + 1, np.int8)
    changes[np.maximum(begin, first) - first] += 1
    changes[np.minimum(end, last) - first] -= 1
    covered = np.cumsum(changes[:-1], dtype=np.int8).astype(bool)
    trained = data.targets[first:last] & covered
    trained[begin[begin >= first] - first] = False
    return covered, trained


def count_parts(data: "TokenSequences") -> np.ndarray:
    """Return int64 [examples]: the number of sequences that have tokens of each example."""
    first = np.searchsorted(data.starts, data.begin, side="right") - 1
    last = np.searchsorted(data.starts, data.end - 1, side="right") - 1
    changes = np.zeros(len(data.starts) + 1, np.int64)
    np.add.at(changes, first, 1)
    np.add.at(changes, last + 1, -1)
    return np.cumsum(changes[:-1])


def count_duplicates(data: "TokenSequences") -> int:
    """Return the number of examples that have the same tokens as an earlier example."""
    digests = np.empty(len(data.starts), "S16")  # a set of objects would take ten times the memory
    for index, (start, end) in enumerate(zip(data.starts, example_ends(data), strict=True)):
        tokens = data.stream[start:end]
        digests[index] = hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()
    return len(digests) - len(np.unique(digests))


def histogram(values: np.ndarray, max_bars: int = MAX_BARS) -> list[list[int]]:
    """Return [smallest value, largest value, number of values] of each bar, in ascending order.

    The bars have equal widths, 1, 2 or 5 times a power of ten. If the values differ much, each bar
    begins at a power of two instead, and ends where the next one begins.

    Args:
        values: int64 [n], not negative; n is at least 1.
        max_bars: Largest number of bars.
    """
    low, high = int(values.min()), int(values.max())
    edges = _ratio_edges(low, high, max_bars)
    if high < _LOG_RANGE * max(low, 1):
        edges = _width_edges(low, high, max_bars)
    bars = np.searchsorted(edges, values, side="right") - 1
    counts = np.bincount(bars, minlength=len(edges) - 1).tolist()
    return [
        [begin, end - 1, number]
        for begin, end, number in zip(edges[:-1], edges[1:], counts, strict=True)
    ]


def _width_edges(low: int, high: int, max_bars: int) -> list[int]:
    """Return the edges of bars of equal width that cover the integers from `low` to `high`."""
    widths = (factor * 10**power for power in range(19) for factor in (1, 2, 5))
    width = next(w for w in widths if high // w - low // w < max_bars)
    return list(range(low // width * width, (high // width + 1) * width + 1, width))


def _ratio_edges(low: int, high: int, max_bars: int) -> list[int]:
    """Return edges as above, each a power of two times the one before; the first may be 0."""
    for bits in range(1, 64):
        first = (max(low, 1).bit_length() - 1) // bits
        last = (high.bit_length() - 1) // bits if high else 0
        edges = [1 << bits * power for power in range(first, last + 2)]
        edges = [0, *edges] if low == 0 else edges
        if len(edges) - 1 <= max_bars:
            break
    return edges
