"""The data of a training with `data.streaming`, which rank 0 reads for all ranks."""

import logging
from pathlib import Path

from hqqtrain.checkpoint.format import Checkpoint
from hqqtrain.config.data_sources import describe_source
from hqqtrain.data.layout import BatchLayout
from hqqtrain.data.sequences import TokenSequences
from hqqtrain.data.streaming.blocks import BlockStream
from hqqtrain.data.streaming.loader import StreamingLoader
from hqqtrain.data.streaming.sources import (
    check_streamed_overlap,
    open_training_stream,
    stream_digest,
)
from hqqtrain.distributed.heartbeat import Heartbeat
from hqqtrain.models.tokenizer import load_tokenizer
from hqqtrain.tasks.context import Run
from hqqtrain.tasks.datasets import sample_held_out_data

logger = logging.getLogger(__name__)


def stream_training_data(
    run: Run,
    tokenizer_folder: Path,
    vocab_size: int,
    layout: BatchLayout,
    checkpoint: Checkpoint | None,
) -> tuple[StreamingLoader, TokenSequences | None, dict[str, str]]:
    """Start to read `data.source`, from the beginning or where `checkpoint` was. Collective.

    Args:
        run: The run.
        tokenizer_folder: The folder of the model's tokenizer.
        vocab_size: Number of token ids that the model knows.
        layout: Which texts may share a row, and a batch.
        checkpoint: The checkpoint to resume from.

    Returns:
        The loader, the held-out set, and a digest of each by its key.

    Raises:
        UserError: The data cannot be read, overlaps with the held-out text, or has changed.
        PreemptedError: A rank was asked to stop.
    """
    config, comm, preemption = run.config, run.runtime.comm, run.runtime.preemption
    where = f"data.source={describe_source(config.data.source)}"
    loader = StreamingLoader(
        where, config.train, comm.run_on_rank0, preemption.check_local,
        rank=comm.rank, world_size=comm.size, device=comm.device, layout=layout,
    )  # fmt: skip
    if checkpoint:
        loader.load_state_dict(checkpoint.state["loader"])

    def check() -> None:
        heartbeat.check()
        preemption.check_local()

    found: tuple[TokenSequences | None, dict[str, str]] = None, {}
    # The first block, and the rows before it, may take longer than a collective may wait.
    with Heartbeat(comm) as heartbeat:
        if comm.is_main:
            stream = open_training_stream(config.data, config.eval, config.train.seed)
            check_streamed_overlap(stream, config.data, config.eval)
            held_out = sample_held_out_data(config, tokenizer_folder, vocab_size)
            digests = {"data.source": stream_digest(stream, config.data)}
            found = held_out, digests | {"eval.source": held_out.digest if held_out else ""}
            # The reader has a tokenizer of its own, because one serves one thread at a time.
            tokenizer = load_tokenizer(tokenizer_folder)
            loader.start(
                BlockStream(stream, tokenizer, config.train, config.data, vocab_size), check
            )
            logger.info("%s: the first sequences are ready; more are read during training", where)
    held_out, digests = comm.run_on_rank0(lambda: found)
    return loader, held_out, digests
