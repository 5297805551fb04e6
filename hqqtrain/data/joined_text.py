"""Measure one text that is the join of all held-out rows, as the scripts of GPTQ and hqq do.

The rows are joined with blank lines, blank rows included, and tokenized at once. A window predicts
`stride` tokens; where the context is longer than the stride, it begins with tokens that the window
before it has predicted. No text is detokenized, and the only special tokens are those that the
tokenizer puts around the whole text.

Sources: `get_wikitext2` and `llama_eval` of https://github.com/IST-DASLab/gptq, and
`eval_wikitext2` in examples/ of https://github.com/mobiusml/hqq.
"""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hqqtrain.common.errors import UserError
from hqqtrain.config.data_sources import describe_source
from hqqtrain.config.eval_protocols import JOINED_PROTOCOLS, JoinedProtocol
from hqqtrain.config.groups import DataConfig, EvalConfig
from hqqtrain.data.packing import EXAMPLES
from hqqtrain.data.sequences import TokenSequences
from hqqtrain.data.sources import evaluates_on_training_source, load_held_out_texts
from hqqtrain.data.token_files import TokenWriter
from hqqtrain.data.tokenization import encode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SEPARATOR = "\n\n"
"""The text between two rows."""


def load_joined_windows(
    evaluation: EvalConfig,
    data: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    on_batch: Callable[[], object] = lambda: None,
    folder: Path | None = None,
) -> TokenSequences:
    """Return the windows of `eval.protocol` over the join of all held-out rows.

    Each window has tokens of its own in the stream. Its targets are the tokens that it predicts,
    with the first one of the text, which the scripts count in the mean, though no token precedes
    it. `eval.tokens` is rounded down to whole strides.

    Args:
        evaluation: The group `eval` of the configuration.
        data: The group `data` of the configuration.
        tokenizer: The tokenizer of the model.
        on_batch: Called now and then; it may raise to stop.
        folder: Where to write the tokens, as for `pack_examples`.

    Raises:
        UserError: The source cannot be read or tokenized, has rows that are no plain text, or is
            shorter than one window.
    """
    protocol, where = JOINED_PROTOCOLS[evaluation.protocol], f"eval.source={evaluation.source}"
    text = SEPARATOR.join(joined_rows(evaluation, data))
    on_batch()
    ids = encode_text(text, tokenizer, where, keeps_eos=protocol.keeps_eos)
    if len(ids) < protocol.context:
        raise UserError(
            f"{where}: the held-out text has {len(ids):,} tokens, fewer than a window of "
            f"eval.protocol={evaluation.protocol}, {protocol.context:,}; use a longer text, or "
            "eval.protocol=windows."
        )
    return cut_strides(_limited(ids, evaluation, protocol), protocol, folder)


def joined_rows(evaluation: EvalConfig, data: DataConfig) -> Iterator[str]:
    """Yield every held-out row, blank ones included.

    Raises:
        UserError: The source cannot be read, its rows are no plain text, or it is streamed.
    """
    name = f"eval.protocol={evaluation.protocol}"
    if data.streaming and evaluates_on_training_source(evaluation, data):
        raise UserError(
            f"{name}: measures the join of all held-out texts, but data.streaming=true reads only "
            f"the first ones of data.source={describe_source(data.source)}; set eval.source to a "
            "source of its own, or data.streaming=false."
        )
    for example in load_held_out_texts(evaluation, data):
        if not isinstance(example, str):
            raise UserError(
                f"{name}: measures plain text, but the rows of eval.source={evaluation.source} are "
                "chats, prompts with completions, or tokens; set eval.source to a source of text, "
                "or eval.protocol=windows."
            )
        yield example


def cut_strides(
    ids: np.ndarray, protocol: JoinedProtocol, folder: Path | None = None
) -> TokenSequences:
    """Cut the tokens of a text into windows, each of which predicts the next `stride` tokens.

    Args:
        ids: The tokens, int32 [T].
        protocol: The lengths of the windows.
        folder: Where to write the tokens; None: they stay in memory.
    """
    writer = TokenWriter(folder, EXAMPLES)
    for start in range(0, len(ids), protocol.stride):
        end = min(start + protocol.stride, len(ids))
        begin = max(start + protocol.stride - protocol.context, 0)
        writer.append(ids[begin:end], np.arange(begin, end) >= start)
    return writer.finish()


def _limited(ids: np.ndarray, evaluation: EvalConfig, protocol: JoinedProtocol) -> np.ndarray:
    """Return the tokens that are measured, and log if `eval.tokens` leaves some out."""
    whole = len(ids) // protocol.stride * protocol.stride
    everything = len(ids) if protocol.measures_rest else whole
    if evaluation.tokens >= everything:
        return ids[:everything]
    measured = evaluation.tokens // protocol.stride * protocol.stride
    logger.warning(
        "eval.tokens=%d: the first %s of %s tokens are measured, in whole windows; to compare with "
        "figures of the whole text, set eval.tokens=%d",
        evaluation.tokens, f"{measured:,}", f"{everything:,}", everything,
    )  # fmt: skip
    return ids[:measured]
