"""The text of `quant.calibration`: some sequences from the tokens of a data source."""

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from hqqtrain.common.errors import UserError
from hqqtrain.config.data_sources import describe_source
from hqqtrain.config.groups import AUTO, DataConfig
from hqqtrain.config.run import RunConfig
from hqqtrain.loading.calibrated_load import Calibration
from hqqtrain.loading.plan import ModelPlan, build_dense
from hqqtrain.models.causal_lm import vocabulary_size
from hqqtrain.models.families.structure import text_config
from hqqtrain.tasks.context import Run
from hqqtrain.tasks.datasets import load_training_data

logger = logging.getLogger(__name__)

SEQUENCE_TOKENS = 512
"""Length of a calibration sequence, unless the model has fewer positions."""


FEW_TOKENS = 4096
"""Fewer tokens of calibration text get a warning.

SmolLM2-135M at 4 bits has 1.084 times the perplexity of full precision with 512 tokens, 1.039 with
4,096, and 1.024 with 65,536; without text 1.198.
"""


def load_calibration(run: Run, plan: ModelPlan) -> Calibration | None:
    """Return the calibration text of a run, the same on all ranks; None if it has none. Collective.

    The sequences are spread evenly over all tokens of the source, without the held-out texts.

    Raises:
        UserError: The source cannot be read, or differs between ranks.
    """
    if not plan.calibrates:
        return None
    config, comm = run.config, run.runtime.comm
    wanted, data = config.quant.calibration, calibration_data(config)
    where = f"quant.calibration={wanted}"
    source = replace(run, config=replace(config, data=data))
    with calibration_errors(config):
        tokens = load_training_data(source, plan.source.tokenizer, vocabulary_size(plan.model))
    stream = tokens.parts.stream  # of all examples, however long the sequences of the run are
    with comm.raise_on_all_ranks():
        limit = getattr(text_config(plan.model), "max_position_embeddings", None)
        sequences = spread_sequences(stream, config.quant.calibration_tokens, limit)
        count, length = sequences.shape
        digest = hashlib.sha256(sequences.tobytes()).hexdigest()
    if len(set(comm.all_gather_object(digest))) > 1:
        raise UserError(
            f"{where}: the text is not the same on all ranks; use the same files and the same "
            "Python version on all machines."
        )
    if comm.is_main:
        logger.info(
            "%s: %d sequences of %d tokens of %s",
            where, count, length, describe_source(data.source),
        )  # fmt: skip
        if count * length < FEW_TOKENS:
            logger.warning(
                "%s: %d tokens are few; more text lowers the error",
                where, count * length,
            )  # fmt: skip
    dense = build_dense(plan.source, plan.hf_config, run.runtime.dtype)
    return Calibration(torch.from_numpy(sequences), dense, f"sha256:{digest}")


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
    count = min(tokens, len(stream)) // length
    first = np.arange(count) * (len(stream) // count)
    return stream[first[:, None] + np.arange(length)].astype(np.int64)


def calibration_data(config: RunConfig) -> DataConfig:
    """Return the group `data` whose source is the calibration text."""
    source, data = config.quant.calibration_source, config.data
    if source in (None, describe_source(data.source)):
        return data
    return replace(data, source=source, format=AUTO, file_type=AUTO)


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
