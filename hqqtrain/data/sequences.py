"""Sequences of tokens, stored as one flat array, with the tokens that the loss predicts.

Texts that share a sequence do not see each other. `position_ids` restart at 0 with every text, and
transformers v5 derives the block-diagonal mask from them, provided that it gets neither an
attention mask nor a cache. So **call the model with use_cache=False**. A sequence of a single text
keeps the fast causal kernel. Padding works the same way: each pad token is a text of its own.
Models that ignore `position_ids` get every text in a row of its own (`hqqtrain/data/layout.py`).
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch

IGNORE_INDEX = -100
"""The label of a token that is not predicted, which the loss ignores."""

CHUNK_TOKENS = 1 << 22
"""Most tokens of a stream that are in memory at a time, unless the stream itself is."""


@dataclass(frozen=True)
class TokenSequences:
    """A list of token sequences, which does not depend on the world size.

    Attributes:
        stream: int32 [T], the tokens of all texts.
        targets: bool [T], whether the loss predicts each token. The first token of a sequence is
            never predicted, whatever its target is.
        starts: int64 [texts], the position in the stream where each text starts, ascending.
        begin: int64 [n], the position in the stream where each sequence begins.
        end: int64 [n], the position after the last token of each sequence.
    """

    stream: np.ndarray
    targets: np.ndarray
    starts: np.ndarray
    begin: np.ndarray
    end: np.ndarray

    def __len__(self) -> int:
        return len(self.begin)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return `input_ids`, `labels` and `position_ids`, int64 [length], for transformers.

        A label has the position of its own token, because the loss shifts labels. The first token
        of the sequence, and every token that is no target, has the label `IGNORE_INDEX`.
        """
        begin, end = int(self.begin[index]), int(self.end[index])
        tokens = self.stream[begin:end].astype(np.int64)
        labels = np.where(self.targets[begin:end], tokens, IGNORE_INDEX)
        labels[:1] = IGNORE_INDEX  # no token of the sequence precedes the first one
        return {
            "input_ids": torch.from_numpy(tokens),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(self._positions(begin, end)),
        }

    @property
    def is_plain_text(self) -> bool:
        """Whether every token but the first of a text is trained."""
        for first, last in chunks(len(self.stream)):
            texts = slice(*np.searchsorted(self.starts, (first, last)))
            expected = plain_text_targets(self.stream[first:last], self.starts[texts] - first)
            if not np.array_equal(self.targets[first:last], expected):
                return False
        return True

    def with_bounds(self, begin: np.ndarray, end: np.ndarray) -> "TokenSequences":
        """Return the sequences from `begin` to `end` of the stream that have a token to predict."""
        predicts = self._count_targets(begin, end) > 0
        return replace(self, begin=begin[predicts], end=end[predicts])

    @cached_property
    def target_token_count(self) -> int:
        """Number of predicted tokens in all sequences."""
        if len(self) * self.max_len < CHUNK_TOKENS:  # such as the sequences of a step
            bounds = zip(self.begin.tolist(), self.end.tolist(), strict=True)
            return sum(int(np.count_nonzero(self.targets[b + 1 : e])) for b, e in bounds)
        return int(self._count_targets(self.begin, self.end).sum())

    @property
    def token_count(self) -> int:
        """Number of tokens in all sequences, predicted or not."""
        return int((self.end - self.begin).sum())

    @property
    def target_counts(self) -> np.ndarray:
        """The number of predicted tokens of each sequence, int64 [n]."""
        return self._count_targets(self.begin, self.end)

    def trains(self, token_id: int) -> bool:
        """Whether a token is among the targets of the texts."""
        return any(
            bool((self.targets[first:last] & (self.stream[first:last] == token_id)).any())
            for first, last in chunks(len(self.stream))
        )

    @cached_property
    def digest(self) -> str:
        """The sha256 of tokens, targets, and the boundaries of texts and sequences.

        The targets of plain text are left out, because they follow from its boundaries. So the
        digest equals that in older checkpoints, which was computed before targets existed.
        """
        arrays = [self.stream, self.starts, self.begin, self.end]
        if not self.is_plain_text:
            arrays.append(self.targets)
        sha256 = hashlib.sha256()
        for array in arrays:
            for first, last in chunks(len(array)):
                sha256.update(np.ascontiguousarray(array[first:last]).data)
        return sha256.hexdigest()

    @cached_property
    def max_len(self) -> int:
        """The length of the longest sequence, in tokens."""
        return int((self.end - self.begin).max(initial=0))

    def _count_targets(self, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Return int64 [n]: the number of targets from `begin + 1` to `end` of the stream."""
        return count_slices(
            lambda first, last: self.targets[first:last], np.minimum(begin + 1, end), end
        )

    def select(self, indices: Sequence[int] | np.ndarray) -> "TokenSequences":
        """Return only the sequences at `indices`, which share the stream."""
        return replace(self, begin=self.begin[indices], end=self.end[indices])

    def split_texts(self) -> "TokenSequences":
        """Return the texts in these sequences, each as a sequence of its own.

        A text of a single token predicts nothing and is left out.
        """
        bounds = []
        for begin, end in zip(self.begin.tolist(), self.end.tolist(), strict=True):
            first_text, end_text = np.searchsorted(self.starts, (begin + 1, end))
            cuts = [begin, *self.starts[first_text:end_text].tolist(), end]
            bounds += [pair for pair in pairwise(cuts) if pair[1] - pair[0] > 1]
        begin, end = np.array(bounds, np.int64).reshape(-1, 2).T
        return replace(self, begin=begin, end=end)

    def _positions(self, begin: int, end: int) -> np.ndarray:
        """Return the position of every token of a sequence within its text."""
        # The positions of the first text count from `begin`, even if it started before. Those of
        # the other texts count from their start, which is inside the sequence.
        first_text, end_text = np.searchsorted(self.starts, (begin + 1, end))
        starts = np.concatenate([[begin], self.starts[first_text:end_text]])
        # Subtract from each token's index in the stream the last start at or before it.
        stream_indices = np.arange(begin, end)
        text_of_token = np.searchsorted(starts, stream_indices, side="right") - 1
        return stream_indices - starts[text_of_token]


def concatenate(parts: list[TokenSequences]) -> TokenSequences:
    """Return the sequences of `parts`, with a stream that has no other tokens."""
    streams, targets, starts, lengths = [], [], [], []
    size = 0
    for part in parts:
        for begin, end in zip(part.begin.tolist(), part.end.tolist(), strict=True):
            streams.append(part.stream[begin:end])
            targets.append(part.targets[begin:end])
            first, last = np.searchsorted(part.starts, (begin, end))
            starts.append(part.starts[first:last] - begin + size)
            lengths.append(end - begin)
            size += end - begin
    ends = np.cumsum(lengths)
    return TokenSequences(
        np.concatenate(streams), np.concatenate(targets), np.concatenate(starts),
        ends - lengths, ends,
    )  # fmt: skip


def plain_text_targets(stream: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return bool [T]: whether a token is not the first of its text.

    No token of the same text precedes the first one, so the loss does not predict it.
    """
    targets = np.ones(len(stream), dtype=bool)
    targets[starts] = False
    return targets


def chunks(length: int) -> Iterator[tuple[int, int]]:
    """Yield the bounds of slices of at most `CHUNK_TOKENS` items, which together cover `length`."""
    for first in range(0, length, CHUNK_TOKENS):
        yield first, min(first + CHUNK_TOKENS, length)


def count_slices(
    mask: Callable[[int, int], np.ndarray], begin: np.ndarray, end: np.ndarray
) -> np.ndarray:
    """Return int64 [n]: the number of True values in each slice of a long mask.

    Args:
        mask: Returns the part of the mask from a first index to a last one, bool [last - first].
        begin: int64 [n], the first index of each slice.
        end: int64 [n], the index after each slice.
    """
    edges = np.concatenate([begin, end])
    order = np.argsort(edges, kind="stable")
    edges = edges[order]
    before = np.empty(len(edges), np.int64)  # the number of True values before each edge
    total = done = 0
    for first, last in chunks(int(edges[-1]) if len(edges) else 0):
        values = mask(first, last)
        stop = int(np.searchsorted(edges, last, side="left"))
        counts = np.append(0, np.cumsum(values, dtype=np.int64))
        before[done:stop] = total + counts[edges[done:stop] - first]
        total, done = total + int(counts[-1]), stop
    before[done:] = total
    counts = np.empty_like(before)
    counts[order] = before
    return counts[len(begin) :] - counts[: len(begin)]
