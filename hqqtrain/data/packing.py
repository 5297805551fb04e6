"""Texts to sequences of tokens, held as one flat array and cut without waste.

Packed, all texts form one stream, each ended by EOS, that is cut every `max_seq_len` tokens:
a long text runs over several sequences, short ones share one, and nothing is dropped (the last
sequence is shorter; a single left-over token predicts nothing and goes). Unpacked, a text is a
sequence of its own, truncated.

Texts that share a sequence do not see each other: `position_ids` start again at 0 with each,
from which transformers v5 builds the block-diagonal mask when it is given no attention mask
and no cache, so **call the model with use_cache=False**. A sequence of one text only keeps the
fast causal kernel. Padding is done the same way: each pad token is a text of its own.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
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
"""The label of a token that is not predicted."""

_BATCH = 256
"""Texts that are tokenized at once."""


@dataclass(frozen=True)
class TokenSequences:
    """A list of token sequences; the same at every world size.

    `stream` int32 [T]: the tokens of all texts; `starts` int64: where each text begins in it,
    ascending; `begin`, `end` int64 [n]: the piece of the stream that each sequence is.
    """

    stream: np.ndarray
    starts: np.ndarray
    begin: np.ndarray
    end: np.ndarray

    def __len__(self) -> int:
        return len(self.begin)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`input_ids`, `labels`, `position_ids`, int64 [length], as Hugging Face models take them.

        Labels stand at the position of their token (the model shifts); the first token of every
        text, and of the sequence, is `IGNORE_INDEX`.
        """
        begin, end = int(self.begin[index]), int(self.end[index])
        tokens = self.stream[begin:end].astype(np.int64)
        positions = self._positions(begin, end)
        labels = np.where(positions == 0, IGNORE_INDEX, tokens)
        return {
            "input_ids": torch.from_numpy(tokens),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(positions),
        }

    @cached_property
    def tokens(self) -> int:
        """How many tokens are predicted, over all sequences."""
        inner = np.searchsorted(self.starts, self.end) - np.searchsorted(
            self.starts, self.begin, side="right"
        )
        return int((self.end - self.begin - 1 - inner).sum())

    def digest(self) -> str:
        """sha256 of all tokens and of how they are cut."""
        parts = (self.stream, self.starts, self.begin, self.end)
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()

    def select(self, indices: Sequence[int] | np.ndarray) -> "TokenSequences":
        """Only these sequences, over the same stream."""
        return replace(self, begin=self.begin[indices], end=self.end[indices])

    def _positions(self, begin: int, end: int) -> np.ndarray:
        low, high = np.searchsorted(self.starts, (begin + 1, end))
        starts = np.concatenate([[begin], self.starts[low:high]])
        where = np.arange(begin, end)
        return where - starts[np.searchsorted(starts, where, side="right") - 1]


def pack_texts(
    texts: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_seq_len: int,
    packing: bool = True,
    on_batch: Callable[[], object] = lambda: None,
) -> TokenSequences:
    """Tokenizes `texts` and cuts them into sequences of at most `max_seq_len` tokens.

    Blank texts are left out; `on_batch` is called now and then, and may raise. Raises UserError
    where nothing is left.
    """
    stream, starts = tokenize_texts(texts, tokenizer, on_batch)
    limits = np.append(starts, len(stream))
    if packing:
        begin = np.arange(0, len(stream), max_seq_len)
        end = np.minimum(begin + max_seq_len, len(stream))
    else:
        begin, end = starts, np.minimum(starts + max_seq_len, limits[1:])
    useful = end - begin > 1
    if not useful.any():
        raise UserError("data.source: no text in it; its texts give no token to predict.")
    return TokenSequences(stream, starts, begin[useful], end[useful])


def tokenize_texts(
    texts: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    on_batch: Callable[[], object] = lambda: None,
) -> tuple[np.ndarray, np.ndarray]:
    """(stream int32 [T], starts int64): every text that is not blank, with its special tokens.

    Each ends in EOS, whether or not the tokenizer adds it.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        logger.warning("the tokenizer has no EOS token: texts are joined without one.")
    pieces = [_ended(ids, eos) for ids in _encode(texts, tokenizer, on_batch)]
    lengths = np.array([len(piece) for piece in pieces], np.int64)
    stream = np.concatenate([np.empty(0, np.int32), *pieces])
    return stream, np.cumsum(lengths) - lengths


def collate_batch(sequences: Iterable[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """One batch, int64 [sequences, longest], padded on the right with what predicts nothing.

    No attention mask: with right padding no token of a text sees one, and transformers finds
    the texts of a sequence by their position_ids only where there is no mask.
    """
    rows = list(sequences)
    fill = {"input_ids": 0, "labels": IGNORE_INDEX, "position_ids": 0}
    return {
        name: torch.nn.utils.rnn.pad_sequence(
            [row[name] for row in rows], batch_first=True, padding_value=value
        )
        for name, value in fill.items()
    }


def _encode(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", on_batch: Callable[[], object]
) -> Iterator[list[int]]:
    for first in range(0, len(texts), _BATCH):
        on_batch()
        batch = [text for text in texts[first : first + _BATCH] if text and text.strip()]
        if batch:
            yield from tokenizer(batch, return_attention_mask=False, verbose=False)["input_ids"]


def _ended(ids: list[int], eos: int | None) -> np.ndarray:
    missing = eos is not None and (not ids or ids[-1] != eos)
    return np.array([*ids, eos] if missing else ids, np.int32)
