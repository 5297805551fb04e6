"""The data loader of `data.streaming`: rank 0 reads the data, and all ranks get each global batch.

A single reader makes the global batch independent of the number of ranks, and only one machine
needs the files. Tokens are small: a global batch of a million tokens has 5 MB.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from hqqtrain.common.errors import DataError, UserError
from hqqtrain.config.groups import TrainConfig
from hqqtrain.data.layout import PACKED, Batch, BatchLayout
from hqqtrain.data.loader import batches_of_rank
from hqqtrain.data.sequences import TokenSequences, concatenate
from hqqtrain.data.streaming.blocks import Block, BlockState, BlockStream
from hqqtrain.data.streaming.reader import BlockReader

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_WAIT_SECONDS = 20 * 60.0
"""Longest wait for data during training: less than the time-out of the ranks that wait, too."""

PATIENCE_SECONDS = 5.0
"""Seconds that a request to stop waits for data, so that the step may still be taken."""

REPORTED_WAIT = 0.05
"""Share of the time that training may wait for data without a warning."""


def run_alone(work: Callable[[], T]) -> T:
    """Return the result of `work`, as `Communicator.run_on_rank0` does for a single process."""
    return work()


@dataclass(frozen=True)
class GlobalBatch:
    """The sequences of an optimizer step.

    Attributes:
        sequences: The sequences, of all ranks.
        samples: The block of each sequence, and its index in the block.
        passes: Number of complete passes over the data.
    """

    sequences: TokenSequences
    samples: list[tuple[int, int]]
    passes: int


class StreamingLoader:
    """Loads batches of sequences that are read while the model is trained; see `DataLoader`.

    Batches can only be asked for in order; those that are left out are read and dropped.

    Args:
        where: `key=source`, for messages.
        config: Batch sizes and number of steps.
        run_on_rank0: Calls a function on rank 0 and returns its result, or raises its error, on
            all ranks.
        check: Called on rank 0 while it waits for data; it may raise to stop.
        rank: This rank.
        world_size: Number of ranks; a divisor of `train.global_batch_size`.
        device: Device of the batches.
        layout: Which texts may share a row, and a batch.
    """

    def __init__(
        self, where: str, config: TrainConfig,
        run_on_rank0: Callable[[Callable[[], Any]], Any] = run_alone,
        check: Callable[[], object] = lambda: None, *,
        rank: int = 0, world_size: int = 1, device: torch.device | str = "cpu",
        layout: BatchLayout = PACKED,
    ) -> None:  # fmt: skip
        assert config.max_steps is not None
        self.total_steps = config.max_steps
        self._where, self._config = where, config
        self._run_on_rank0, self._check = run_on_rank0, check
        self._layout, self._device = layout, device
        self._rank, self._world_size = rank, world_size
        self._batch_index = -1  # the last batch that was asked for
        self._batch: GlobalBatch | None = None
        self._next_index, self._offset = 0, 0  # the batch to read, and its first sequence
        self._resumed: Mapping[str, Any] = {}
        self._reader: BlockReader | None = None
        self._block: Block | None = None
        self._last_report = time.monotonic()

    def start(self, blocks: BlockStream, check: Callable[[], object] = lambda: None) -> None:
        """Start to read, and wait for the first block; only rank 0 must call this.

        Args:
            blocks: The data, which only a thread of the loader uses from now on.
            check: Called while waiting; it may raise.

        Raises:
            UserError: The data cannot be read, or is not that of the loaded state.
        """
        state = BlockState.from_json(self._resumed["state"]) if self._resumed else None
        if state and state.place.examples:
            examples = f"{state.place.examples:,} examples"
            logger.info("%s: the run continues after its first %s", self._where, examples)
        self._reader = BlockReader(lambda on_batch: blocks.read(state, on_batch), self._where)
        try:
            self._block = self._reader.next(check, max_seconds=None)
            if self._resumed and self._block.digest != self._resumed["digest"]:
                raise UserError(
                    f"{self._where}: its text is not that of the checkpoint any more. Choose "
                    "another run.name, or run.resume=never."
                )
        except BaseException as error:
            self.close()
            if isinstance(error, UserError):
                check()  # see `_next_block`
            raise
        self._last_report = time.monotonic()

    def batches(self, batch_index: int) -> Iterator[Batch]:
        return batches_of_rank(
            self._load(batch_index).sequences,
            self._config,
            self._layout,
            rank=self._rank,
            world_size=self._world_size,
            device=self._device,
        )

    def target_token_count(self, batch_index: int) -> int:
        return self._load(batch_index).sequences.target_token_count

    def token_count(self, batch_index: int) -> int:
        return self._load(batch_index).sequences.token_count

    def epoch(self, batch_index: int) -> float:
        """Return the number of complete passes over the data, because its size is not known."""
        return float(self._batch.passes) if self._batch else 0.0

    def describe(self, batch_index: int) -> dict[str, Any]:
        """Return [block, index in the block] of the sequences as `samples`, and their `tokens`."""
        batch = self._load(batch_index)
        tokens = [sequence["input_ids"].tolist() for sequence in batch.sequences]
        return {"samples": batch.samples, "tokens": tokens}

    def trains(self, token_id: int) -> bool:
        assert self._block is not None
        return self._block.sequences.trains(token_id)

    def state_dict(self) -> dict[str, Any]:
        """Return where the next batch begins: the state before a block, and how much is used."""
        if self._block is None:  # another rank than 0, or before the start
            return dict(self._resumed)
        return {
            "batch_index": self._next_index,
            "state": self._block.state.to_json(),
            "digest": self._block.digest,
            "sequence": self._offset,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert self._reader is None, "call it before `start`"
        self._resumed = state
        self._next_index, self._offset = state["batch_index"], state["sequence"]

    def close(self) -> None:
        if self._reader:
            self._reader.close()

    def _load(self, batch_index: int) -> GlobalBatch:
        """Return a global batch: the current one, or a later one. Collective.

        Raises:
            DataError: The data cannot be read; on all ranks.
            PreemptedError: Rank 0 was asked to stop while it waited for data; on all ranks.
        """
        if self._batch is None or batch_index != self._batch_index:
            try:
                self._batch = self._run_on_rank0(lambda: self._read(batch_index))
            except UserError as error:
                raise DataError(str(error)) from error
            self._batch_index = batch_index
        return self._batch

    def _read(self, batch_index: int) -> GlobalBatch:
        """Read the batches up to one with an index, and return that."""
        assert self._block is not None
        assert batch_index >= self._next_index, "batches cannot be read again"
        size, before = self._config.global_batch_size, (self._block, self._offset)
        try:
            for _ in range(self._next_index, batch_index):
                self._take(size)
            parts, samples, passes = self._take(size)
        except Exception:
            self._block, self._offset = before  # where the run resumes
            raise
        self._next_index = batch_index + 1
        if passes > before[0].passes:
            logger.info("%s: pass %d over the data begins", self._where, passes + 1)
        return GlobalBatch(concatenate(parts), samples, passes)

    def _take(self, number: int) -> tuple[list[TokenSequences], list[tuple[int, int]], int]:
        """Return the next sequences, where they are in their blocks, and the number of passes."""
        assert self._block is not None
        parts, samples = list[TokenSequences](), list[tuple[int, int]]()
        while len(samples) < number:
            if self._offset == len(self._block.sequences):
                self._block, self._offset = self._next_block(), 0
                continue
            end = min(self._offset + number - len(samples), len(self._block.sequences))
            indices = range(self._offset, end)
            parts.append(self._block.sequences.select(list(indices)))
            samples += [(self._block.state.block, index) for index in indices]
            self._offset = end
        return parts, samples, self._block.passes

    def _next_block(self) -> Block:
        """Return the next block, and log if training waits too long for data."""
        assert self._reader is not None
        started = time.monotonic()

        def check() -> None:
            if time.monotonic() - started > PATIENCE_SECONDS:
                self._check()

        try:
            block = self._reader.next(check, max_seconds=MAX_WAIT_SECONDS)
        except UserError:
            # A signal to all processes also ends those that are just starting to encode.
            self._check()
            raise
        now = time.monotonic()
        waited, elapsed = now - started, now - self._last_report
        if waited > max(1.0, REPORTED_WAIT * elapsed):
            logger.warning(
                "%s: training has waited %.0f s for data, %.0f %% of its time since the last block "
                "of sequences; tokenize the data first (data.streaming=false) if it fits",
                self._where, waited, 100 * waited / elapsed,
            )  # fmt: skip
        self._last_report = now
        return block
