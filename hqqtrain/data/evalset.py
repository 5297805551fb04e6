"""The held-out text that a perplexity is measured on, small and the same in every run."""

from typing import TYPE_CHECKING

import numpy as np

from hqqtrain.config import DataConfig, EvalConfig
from hqqtrain.data.packing import Sequences, pack
from hqqtrain.data.sources import held_out_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def evaluation_set(
    evaluation: EvalConfig,
    data: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    max_seq_len: int,
) -> Sequences | None:
    """Windows of `max_seq_len` tokens spread evenly over the held-out text; None without one.

    Together they hold at most `eval.tokens` tokens, the first of each text or window included,
    which is not predicted. Raises UserError where the source is at fault.
    """
    if evaluation.source is None:
        return None
    length = min(max_seq_len, evaluation.tokens)
    windows = pack(held_out_texts(evaluation, data), tokenizer, max_seq_len=length)
    return spread(windows, evaluation.tokens // length)


def spread(windows: Sequences, count: int) -> Sequences:
    """`count` of the windows, at even distances over all of them; all where they are fewer."""
    if count >= len(windows):
        return windows
    return windows.select(((np.arange(count) + 0.5) * len(windows) / count).astype(np.int64))
