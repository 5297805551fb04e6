"""Sample the held-out set on which perplexity is measured.

The set is small, and as equal as possible on different machines. Each text is cut into windows from
its start, and a hash of a window's content, not its position, decides whether it is sampled. The
standard libraries of two Python versions differ in some modules, but the windows of all other
modules are equal. So the perplexities of two machines can be compared.
"""

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hqqtrain.common.errors import UserError
from hqqtrain.config.groups import DataConfig, EvalConfig
from hqqtrain.data.joined_text import load_joined_windows
from hqqtrain.data.packing import cut_long, encode_stream
from hqqtrain.data.sequences import TokenSequences
from hqqtrain.data.texts import held_out_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

FEW_TOKENS = 2000
"""Held-out text with fewer tokens than this gives a perplexity that is mostly noise."""


def load_eval_set(
    evaluation: EvalConfig,
    data: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    max_seq_len: int,
    *,
    on_batch: Callable[[], object] = lambda: None,
    folder: Path | None = None,
) -> TokenSequences | None:
    """Return the windows of the held-out texts that `eval.protocol` measures.

    With `eval.protocol=windows`, they have at most `max_seq_len` tokens. No window crosses the end
    of its text. Together the windows have `eval.tokens` tokens if there are as many: the last
    window is cut. If `eval.tokens` is a multiple of `max_seq_len`, windows are measured as a whole,
    and their sum may be smaller. The number includes the first token of each window, which is not
    predicted. For the other protocols, see `load_joined_windows`.

    Args:
        evaluation: The group `eval` of the configuration.
        data: The group `data` of the configuration.
        tokenizer: The tokenizer of the model.
        max_seq_len: Largest number of tokens in a window.
        on_batch: Called now and then; it may raise to stop.
        folder: Where to write the tokens, as for `pack_examples`.

    Returns:
        The windows, or None if eval.source is null.

    Raises:
        UserError: The source cannot be read or tokenized, or contains no text.
    """
    if evaluation.source is None:
        return None
    if evaluation.joins_texts:
        return load_joined_windows(evaluation, data, tokenizer, on_batch=on_batch, folder=folder)
    length = min(max_seq_len, evaluation.tokens)
    where = f"eval.source={evaluation.source}"
    examples = held_out_texts(evaluation, data)
    tokens = encode_stream(examples, tokenizer, data, where, on_batch, folder)
    candidates = cut_windows(tokens, length)
    if not len(candidates):
        raise UserError(f"{where}: no text in it has a token to predict.")
    cuts = evaluation.tokens % max_seq_len != 0
    windows = sample_windows(candidates, evaluation.tokens, cuts=cuts)
    measured, there = (int((each.end - each.begin).sum()) for each in (windows, candidates))
    _warn_of_few_tokens(measured, there, evaluation, length)
    return windows


def _warn_of_few_tokens(measured: int, there: int, evaluation: EvalConfig, length: int) -> None:
    """Log if few tokens are `measured` of those that are `there`, in windows of `length`."""
    if there < min(FEW_TOKENS, evaluation.tokens):
        logger.warning(
            "eval.source=%s: the held-out text has only %d tokens, so its perplexity is mostly "
            "noise; hold out more text with data.validation, or set eval.source to a longer text",
            evaluation.source, there,
        )  # fmt: skip
    elif measured < min(evaluation.tokens, there) / 2:
        logger.warning(
            "eval.tokens=%d: only %d tokens are measured, because windows of up to %d tokens "
            "(train.max_seq_len) are measured as a whole; use more tokens or shorter windows",
            evaluation.tokens, measured, length,
        )  # fmt: skip


def cut_windows(examples: TokenSequences, length: int) -> TokenSequences:
    """Cut every example from its start into windows of `length` tokens that predict a token."""
    return cut_long(examples, length, "split", "eval.source")


def sample_windows(
    windows: TokenSequences, max_tokens: int, *, cuts: bool = False
) -> TokenSequences:
    """Select windows in ascending order of their hashes, up to `max_tokens` tokens in total.

    The selected windows keep their original order.

    Args:
        windows: The windows.
        max_tokens: Largest number of tokens in total.
        cuts: Whether the first window that does not fit is cut so that it does. A single token is
            left out, because it predicts nothing.
    """
    count = len(windows)
    hashes = np.fromiter((_window_hash(windows, index) for index in range(count)), "S8", count)
    order = np.argsort(hashes, kind="stable")
    total_tokens = np.cumsum((windows.end - windows.begin)[order])
    count = int(np.count_nonzero(total_tokens <= max_tokens))
    rest = max_tokens - (int(total_tokens[count - 1]) if count else 0)
    end = windows.end.copy()
    if cuts and count < len(order) and rest > 1:
        end[order[count]] = windows.begin[order[count]] + rest
        count += 1
    chosen = np.sort(order[:count])
    return windows.with_bounds(windows.begin[chosen], end[chosen])


def _window_hash(windows: TokenSequences, index: int) -> bytes:
    """Return a hash of the tokens of one window, the same on all machines."""
    tokens = windows.stream[windows.begin[index] : windows.end[index]]
    return hashlib.sha256(tokens.astype("<i4").tobytes()).digest()[:8]
