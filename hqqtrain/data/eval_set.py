"""Sample the held-out set that perplexity is measured on.

The set is small, and as equal as possible on different machines. Windows start at the beginning of
their text, and are sampled by a hash of their content instead of their position. The standard
libraries of two Python versions differ in some modules, but all other modules give the same
windows. So the perplexities of two machines can be compared.
"""

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from hqqtrain.common.errors import UserError
from hqqtrain.config.groups import DataConfig, EvalConfig
from hqqtrain.data.packing import TokenSequences, pack_texts
from hqqtrain.data.sources import load_held_out_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_eval_set(
    evaluation: EvalConfig,
    data: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    max_seq_len: int,
) -> TokenSequences | None:
    """Sample windows of at most `max_seq_len` tokens from the held-out texts.

    No window crosses the end of its text. Together the windows have at most `eval.tokens` tokens,
    which includes the first token of each window, although it is not predicted.

    Returns:
        The windows, or None if eval.source is null.

    Raises:
        UserError: The source cannot be read or contains no text.
    """
    if evaluation.source is None:
        return None
    length = min(max_seq_len, evaluation.tokens)
    texts = pack_texts(load_held_out_texts(evaluation, data), tokenizer, max_seq_len=length)
    candidates = cut_windows(texts, length)
    if not len(candidates):
        raise UserError(f"eval.source={evaluation.source}: no text in it has a token to predict.")
    return sample_windows(candidates, evaluation.tokens)


def cut_windows(texts: TokenSequences, length: int) -> TokenSequences:
    """Cut every text from its start into windows of `length` tokens; drop windows of one token."""
    ends = np.append(texts.starts[1:], len(texts.stream))
    # A window starts every `length` tokens of a text, and ends no later than the text does.
    begin = np.concatenate(
        [np.arange(s, e, length) for s, e in zip(texts.starts, ends, strict=True)]
    )
    end = np.minimum(begin + length, ends[np.searchsorted(texts.starts, begin, side="right") - 1])
    has_prediction = end - begin > 1
    return replace(texts, begin=begin[has_prediction], end=end[has_prediction])


def sample_windows(pieces: TokenSequences, tokens: int) -> TokenSequences:
    """Select windows in ascending order of their hashes, up to `tokens` tokens in total.

    The selected windows keep their original order.
    """
    order = np.argsort([_digest(pieces, i) for i in range(len(pieces))], kind="stable")
    total = np.cumsum((pieces.end - pieces.begin)[order])
    return pieces.select(np.sort(order[total <= tokens]))


def _digest(pieces: TokenSequences, index: int) -> bytes:
    """Return a hash of the tokens of one window."""
    tokens = pieces.stream[pieces.begin[index] : pieces.end[index]]
    return hashlib.sha256(tokens.astype("<i4").tobytes()).digest()[:8]
