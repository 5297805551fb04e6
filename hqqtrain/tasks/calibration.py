"""The text of `quant.calibration`: some sequences from the tokens of a data source."""

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from hqqtrain.common.errors import UserError
from hqqtrain.common.text import count
from hqqtrain.config.data_sources import describe_source
from hqqtrain.config.groups import AUTO
from hqqtrain.config.run import RunConfig
from hqqtrain.data.overlap import check_overlap
from hqqtrain.data.packing import TokenizedData
from hqqtrain.data.sequences import TokenSequences
from hqqtrain.loading.calibrated_load import Calibration
from hqqtrain.loading.plan import ModelPlan, build_dense
from hqqtrain.models.causal_lm import vocabulary_size
from hqqtrain.models.families.structure import text_config
from hqqtrain.models.tokenizer import load_tokenizer
from hqqtrain.tasks.context import Run
from hqqtrain.tasks.datasets import load_training_data
from hqqtrain.tasks.token_cache import CachedTokens

logger = logging.getLogger(__name__)

SEQUENCE_TOKENS = 512
"""Length of a calibration sequence, unless the model has fewer positions."""


FEW_TOKENS = 4096
"""Fewer tokens of calibration text get a warning.

SmolLM2-135M at 4 bits has 1.088 times the perplexity of full precision with 512 tokens, 1.034 with
4,096, and 1.022 with 65,536; without text 1.198.
"""


def load_calibration(
    run: Run,
    plan: ModelPlan,
    held_out: TokenSequences | None = None,
    training: TokenizedData | CachedTokens | None = None,
) -> Calibration | None:
    """Return the calibration text of a run, the same on all ranks; None if it has none. Collective.

    The sequences are spread evenly over all tokens of the source, without the held-out texts.

    Args:
        run: The run.
        plan: The plan of its model.
        held_out: The text that is measured, if any; a text of its own must not overlap with it.
        training: The training data, if it was loaded already.

    Raises:
        UserError: The source cannot be read, differs between ranks, or is measured, too.
    """
    if not plan.calibrates:
        return None
    config, comm = run.config, run.runtime.comm
    as_training = calibration_config(config)
    data, where = as_training.data, f"quant.calibration={config.quant.calibration}"
    if comm.is_main and data is not config.data:
        logger.info("%s: the text is read as that of data.source would be", where)
    if training is None or data is not config.data:
        source = replace(run, config=as_training)
        with calibration_errors(config):
            training = load_training_data(
                source, plan.source.tokenizer, vocabulary_size(plan.model)
            )
    stream = training.parts.stream  # of all examples, however long the sequences of the run are
    with comm.raise_on_all_ranks():
        limit = getattr(text_config(plan.model), "max_position_embeddings", None)
        sequences = spread_sequences(stream, config.quant.calibration_tokens, limit)
        digest = hashlib.sha256(sequences.tobytes()).hexdigest()
    if len(set(comm.all_gather_object(digest))) > 1:
        raise UserError(
            f"{where}: the text is not the same on all ranks; use the same files and the same "
            "Python version on all machines."
        )
    with comm.raise_on_all_ranks():
        if comm.is_main:
            _log_size(where, describe_source(data.source), *sequences.shape)
            if held_out is not None and data is not config.data:
                tokenizer = load_tokenizer(plan.source.tokenizer)
                _check_not_measured(config, tokenizer, sequences, held_out)
    dense = build_dense(plan.source, plan.hf_config, run.runtime.dtype)
    return Calibration(
        torch.from_numpy(sequences), dense, f"sha256:{digest}", describe_source(data.source)
    )


def spread_sequences(
    stream: NDArray[np.integer], tokens: int, limit: int | None
) -> NDArray[np.int64]:
    """Return sequences that are spread evenly over a stream of token ids.

    Args:
        stream: The token ids of all texts, [N].
        tokens: Number of tokens wanted; fewer if the stream is shorter.
        limit: The largest number of positions of the model, if it has one.

    Returns:
        Token ids, [sequences, SEQUENCE_TOKENS]; shorter if `limit` or the stream is.
    """
    length = min(SEQUENCE_TOKENS, limit or SEQUENCE_TOKENS, len(stream))
    number = min(tokens, len(stream)) // length
    first = np.arange(number) * (len(stream) // number)
    return stream[first[:, None] + np.arange(length)].astype(np.int64)


def calibration_config(config: RunConfig) -> RunConfig:
    """Return the configuration whose training text is the calibration text.

    Nothing of a text of its own is held out, because it is not measured, and nothing is trained on.
    """
    source, data = config.quant.calibration_source, config.data
    if source in (None, describe_source(data.source)):
        return config
    data = replace(data, source=source, format=AUTO, file_type=AUTO)
    return replace(config, task="quantize", data=data, eval=replace(config.eval, source=None))


def _log_size(where: str, source: str, sequences: int, length: int) -> None:
    """Log how much text there is, and warn if that is little."""
    logger.info("%s: %s of %d tokens of %s", where, count(sequences, "sequence"), length, source)
    if sequences * length < FEW_TOKENS:
        logger.warning(
            "%s: %s are few, and the error may be higher than without text; use more text",
            where, count(sequences * length, "token"),
        )  # fmt: skip


def _check_not_measured(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    sequences: np.ndarray,
    held_out: TokenSequences,
) -> None:
    """Refuse calibration `sequences`, int64 [n, length], that are held-out text for the most part.

    Raises:
        UserError: More than a few of the held-out characters are also in the calibration text.
    """
    windows = [
        held_out.stream[first:last].tolist()
        for first, last in zip(held_out.begin, held_out.end, strict=True)
    ]
    check_overlap(
        tokenizer.batch_decode(sequences, skip_special_tokens=True),
        tokenizer.batch_decode(windows, skip_special_tokens=True),
        f"eval.source={config.eval.source}, quant.calibration={config.quant.calibration}",
        ", or set quant.calibration=auto, which uses the training text",
        use="calibration",
    )


@contextmanager
def calibration_errors(config: RunConfig) -> Iterator[None]:
    """Let errors about the calibration text name the key that it comes from."""
    try:
        yield
    except UserError as error:
        if config.quant.calibration_source is None:
            raise
        raise UserError(str(error).replace("data.source=", "quant.calibration=")) from error


def packed_weights_digest(source_digest: str, calibration: Calibration | None) -> str:
    """Return the digest of all that packed weights are made from: the model, and any text."""
    if calibration is None:
        return source_digest
    parts = f"{source_digest} {calibration.digest}"
    return f"sha256:{hashlib.sha256(parts.encode()).hexdigest()}"
