"""Turn texts into sequences of tokens, stored as one flat array and packed without waste.

With packing, all texts form one stream, each text ends with EOS, and the stream is cut every
`max_seq_len` tokens. A long text spans several sequences, short texts share one, and no token is
dropped, except a single last one: the last sequence may be shorter, but one token alone predicts
nothing. Without packing, every text becomes one sequence and is truncated.

Texts that share a sequence do not attend to each other. `position_ids` restart at 0 with every
text, and transformers v5 derives the block-diagonal mask from them, provided that it gets neither
an attention mask nor a cache. So **call the model with use_cache=False**. A sequence of a single
text keeps the fast causal kernel. Padding works the same way: each pad token is a text of its own.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from hqqtrain.common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

IGNORE_INDEX = -100
"""The label of a token that is not predicted, which the loss ignores."""

_BATCH = 256
"""Texts in one call of the tokenizer."""


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

    @cached_property
    def target_token_count(self) -> int:
        """Number of predicted tokens in all sequences."""
        bounds = zip(self.begin.tolist(), self.end.tolist(), strict=True)
        return sum(int(np.count_nonzero(self.targets[begin + 1 : end])) for begin, end in bounds)

    def digest(self) -> str:
        """Return the sha256 of tokens, targets, and the boundaries of texts and sequences.

        The targets of plain text follow from its boundaries and are left out, so that checkpoints
        keep the digest that was computed before targets existed.
        """
        parts = [self.stream, self.starts, self.begin, self.end]
        if not np.array_equal(self.targets, plain_text_targets(self.stream, self.starts)):
            parts.append(self.targets)
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()

    def select(self, indices: Sequence[int] | np.ndarray) -> "TokenSequences":
        """Return only the sequences at `indices`, which share the stream."""
        return replace(self, begin=self.begin[indices], end=self.end[indices])

    def _positions(self, begin: int, end: int) -> np.ndarray:
        """Return the position of every token of a sequence within its text."""
        # Texts that start inside the sequence. The one at `begin`, whole or continued, counts from
        # `begin`.
        low, high = np.searchsorted(self.starts, (begin + 1, end))
        starts = np.concatenate([[begin], self.starts[low:high]])
        # Every token subtracts the last start at or before it.
        places = np.arange(begin, end)
        return places - starts[np.searchsorted(starts, places, side="right") - 1]


def pack_texts(
    texts: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_seq_len: int,
    packing: bool = True,
    on_batch: Callable[[], object] = lambda: None,
) -> TokenSequences:
    """Tokenize `texts` and cut them into sequences of at most `max_seq_len` tokens.

    Args:
        texts: The texts; blank ones are skipped.
        tokenizer: The tokenizer of the model.
        max_seq_len: Largest number of tokens in a sequence.
        packing: Whether texts share sequences; otherwise every text is truncated.
        on_batch: Called before every batch of texts; it may raise to stop.

    Raises:
        UserError: No sequence has a token to predict.
    """
    stream, starts = tokenize_texts(texts, tokenizer, on_batch)
    if packing:
        begin = np.arange(0, len(stream), max_seq_len)
        end = np.minimum(begin + max_seq_len, len(stream))
    else:
        next_starts = np.append(starts, len(stream))[1:]
        begin, end = starts, np.minimum(starts + max_seq_len, next_starts)
    has_prediction = end - begin > 1  # a single token predicts nothing
    if not has_prediction.any():
        raise UserError("data.source: no text in it; its texts have no token to predict.")
    targets = plain_text_targets(stream, starts)
    return TokenSequences(stream, targets, starts, begin[has_prediction], end[has_prediction])


def plain_text_targets(stream: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return bool [T]: every token but the first of each text, which no earlier token predicts."""
    targets = np.ones(len(stream), dtype=bool)
    targets[starts] = False
    return targets


def tokenize_texts(
    texts: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    on_batch: Callable[[], object] = lambda: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenize every text that is not blank, with its special tokens.

    Every text ends with EOS, whether or not the tokenizer adds it.

    Returns:
        The tokens of all texts, int32 [T], and the start of each text, int64 [texts].
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        logger.warning("the tokenizer has no EOS token: texts are joined without one.")
    encoded = []
    for ids in _encode(texts, tokenizer, on_batch):
        lacks_eos = eos is not None and (not ids or ids[-1] != eos)
        encoded.append(np.array([*ids, eos] if lacks_eos else ids, np.int32))
    lengths = np.array([len(ids) for ids in encoded], np.int64)
    stream = np.concatenate([np.empty(0, np.int32), *encoded])  # also for no texts
    return stream, np.cumsum(lengths) - lengths


def _encode(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", on_batch: Callable[[], object]
) -> Iterator[list[int]]:
    """Yield the token ids of every text that is not blank."""
    for first in range(0, len(texts), _BATCH):
        on_batch()
        batch = [text for text in texts[first : first + _BATCH] if text and text.strip()]
        if batch:
            yield from tokenizer(batch, return_attention_mask=False, verbose=False)["input_ids"]
