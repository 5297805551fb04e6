"""The held-out text that a perplexity is measured on: small, and the same wherever it can be.

A window starts with its text, and which ones are taken is decided by what they hold, not by
where they lie: two Pythons' standard libraries differ in some modules, and the windows of all
others are the same. So figures of two machines can be compared.
"""

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from hqqtrain.common.errors import UserError
from hqqtrain.config.groups import DataConfig, EvalConfig
from hqqtrain.data.packing import TokenSequences, pack_texts
from hqqtrain.data.sources import held_out_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def evaluation_set(
    evaluation: EvalConfig,
    data: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    max_seq_len: int,
) -> TokenSequences | None:
    """Windows of at most `max_seq_len` tokens, a sample of the held-out text; None without one.

    No window runs over the end of its text. Together they hold at most `eval.tokens` tokens, the
    first of each included, which is not predicted. Raises UserError where the source is at fault.
    """
    if evaluation.source is None:
        return None
    length = min(max_seq_len, evaluation.tokens)
    texts = pack_texts(held_out_texts(evaluation, data), tokenizer, max_seq_len=length)
    pieces = cut_windows(texts, length)
    if not len(pieces):
        raise UserError(f"eval.source={evaluation.source}: no text in it has a token to predict.")
    return sample_windows(pieces, evaluation.tokens)


def cut_windows(texts: TokenSequences, length: int) -> TokenSequences:
    """Every text, cut from its start into pieces of `length` tokens; single tokens are left out."""
    ends = np.append(texts.starts[1:], len(texts.stream))
    begin = np.concatenate(
        [np.arange(s, e, length) for s, e in zip(texts.starts, ends, strict=True)]
    )
    end = np.minimum(begin + length, ends[np.searchsorted(texts.starts, begin, side="right") - 1])
    useful = end - begin > 1
    return replace(texts, begin=begin[useful], end=end[useful])


def sample_windows(pieces: TokenSequences, tokens: int) -> TokenSequences:
    """The pieces with the lowest hashes that together hold at most `tokens`, in their order."""
    order = np.argsort([_digest(pieces, i) for i in range(len(pieces))], kind="stable")
    held = np.cumsum((pieces.end - pieces.begin)[order])
    return pieces.select(np.sort(order[held <= tokens]))


def _digest(pieces: TokenSequences, index: int) -> bytes:
    tokens = pieces.stream[pieces.begin[index] : pieces.end[index]]
    return hashlib.sha256(tokens.astype("<i4").tobytes()).digest()[:8]
