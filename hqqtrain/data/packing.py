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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from hqqtrain.config import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

IGNORED = -100
"""The label of a token that is not predicted, which the loss ignores."""

_BATCH = 256
"""Texts in one call of the tokenizer."""


@dataclass(frozen=True)
class Sequences:
    """A list of token sequences, which does not depend on the world size.

    Attributes:
        stream: int32 [T], the tokens of all texts.
        starts: int64 [texts], the position in the stream where each text starts, ascending.
        begin: int64 [n], the position in the stream where each sequence begins.
        end: int64 [n], the position after the last token of each sequence.
    """

    stream: np.ndarray
    starts: np.ndarray
    begin: np.ndarray
    end: np.ndarray

    def __len__(self) -> int:
        return len(self.begin)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return `input_ids`, `labels` and `position_ids`, int64 [length], for transformers.

        A label has the position of its own token, because the model shifts labels. The first token
        of the sequence, and of every text, has the label `IGNORED`.
        """
        begin, end = int(self.begin[index]), int(self.end[index])
        tokens = self.stream[begin:end].astype(np.int64)
        positions = self._positions(begin, end)
        # Position 0 is the first token of a text or of the sequence: nothing predicts it.
        labels = np.where(positions == 0, IGNORED, tokens)
        return {
            "input_ids": torch.from_numpy(tokens),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(positions),
        }

    @cached_property
    def tokens(self) -> int:
        """Number of predicted tokens in all sequences."""
        # A sequence does not predict its first token, nor the first tokens of texts that start
        # inside it: begin < start < end.
        texts_before_end = np.searchsorted(self.starts, self.end)
        texts_up_to_begin = np.searchsorted(self.starts, self.begin, side="right")
        inner_starts = texts_before_end - texts_up_to_begin
        return int((self.end - self.begin - 1 - inner_starts).sum())

    def digest(self) -> str:
        """Return the sha256 of all tokens and of the boundaries of texts and sequences."""
        parts = (self.stream, self.starts, self.begin, self.end)
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()

    def select(self, indices: Sequence[int] | np.ndarray) -> "Sequences":
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


def pack(
    texts: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_seq_len: int,
    packing: bool = True,
    on_batch: Callable[[], object] = lambda: None,
) -> Sequences:
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
    stream, starts = tokenize(texts, tokenizer, on_batch)
    if packing:
        begin = np.arange(0, len(stream), max_seq_len)
        end = np.minimum(begin + max_seq_len, len(stream))
    else:
        next_starts = np.append(starts, len(stream))[1:]
        begin, end = starts, np.minimum(starts + max_seq_len, next_starts)
    has_prediction = end - begin > 1  # a single token predicts nothing
    if not has_prediction.any():
        raise UserError("data.source: no text in it; its texts have no token to predict.")
    return Sequences(stream, starts, begin[has_prediction], end[has_prediction])


def tokenize(
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


def collate(sequences: Iterable[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Combine sequences into a batch, int64 [sequences, longest], padded on the right.

    The batch has no attention mask. Tokens of a text precede the padding and never attend to it,
    and transformers detects the texts of a sequence from position_ids only without a mask.
    """
    rows = list(sequences)
    # Position 0 makes every pad token a text of its own.
    padding = {"input_ids": 0, "labels": IGNORED, "position_ids": 0}
    return {
        name: torch.nn.utils.rnn.pad_sequence(
            [row[name] for row in rows], batch_first=True, padding_value=value
        )
        for name, value in padding.items()
    }


def _encode(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", on_batch: Callable[[], object]
) -> Iterator[list[int]]:
    """Yield the token ids of every text that is not blank."""
    for first in range(0, len(texts), _BATCH):
        on_batch()
        batch = [text for text in texts[first : first + _BATCH] if text and text.strip()]
        if batch:
            yield from tokenizer(batch, return_attention_mask=False, verbose=False)["input_ids"]
