"""The data loader: the micro-batches that a rank feeds to the model in each optimizer step.

A step trains on one global batch, which does not depend on the number of ranks. Rank r of n takes
its sequences r, r + n, r + 2n, ... in micro-batches of at most `micro_batch_size` sequences. The
trainer knows only the `DataLoader` protocol. `StreamingLoader` loads data that is read while the
model is trained.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch

from hqqtrain.config.groups import TrainConfig
from hqqtrain.data.layout import PACKED, Batch, BatchLayout, batch_on_device
from hqqtrain.data.order import SampleOrder
from hqqtrain.data.sequences import IGNORE_INDEX, TokenSequences


class DataLoader(Protocol):
    """Gives each rank its part of the global batches of a training, by their index from 0."""

    total_steps: int
    """Number of optimizer steps of the training."""

    def batches(self, batch_index: int) -> Iterator[Batch]:
        """Yield this rank's micro-batches of a global batch, on the rank's device."""

    def target_token_count(self, batch_index: int) -> int:
        """Return the number of target tokens in a global batch, summed over all ranks."""

    def token_count(self, batch_index: int) -> int:
        """Return the number of tokens that the model reads in a global batch, without padding."""

    def epoch(self, batch_index: int) -> float:
        """Return the number of passes over the data before a global batch."""

    def describe(self, batch_index: int) -> dict[str, Any]:
        """Return JSON values that show which text a global batch has, for an error report."""

    def trains(self, token_id: int) -> bool:
        """Whether the loss predicts a token anywhere in the data; only rank 0 may ask.

        If the data is read while the model is trained, only the part that is in memory counts.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed loader needs in addition to the index of the batch, as JSON."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` has returned."""

    def close(self) -> None:
        """Stop reading ahead, if the loader does."""


class PackedLoader:
    """Loads batches of sequences that are in memory or in mapped files, in a shuffled order.

    Every rank has all sequences. So a global batch is a function of the seed and of its index: a
    resumed run asks for its next index, no state is saved, and ranks need not communicate.

    Args:
        sequences: The training text, the same on all ranks.
        config: Batch sizes, number of steps and seed.
        rank: This rank.
        world_size: Number of ranks; a divisor of `train.global_batch_size`.
        device: Device of the batches.
        layout: Which texts may share a row, and a batch.
    """

    def __init__(
        self,
        sequences: TokenSequences,
        config: TrainConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        layout: BatchLayout = PACKED,
    ) -> None:
        self._sequences, self._device, self._layout = sequences, device, layout
        self._rank, self._world_size = rank, world_size
        self._order = SampleOrder(len(sequences), config.seed)
        self._config = config
        self.total_steps = (
            self._order.steps(config.epochs, config.global_batch_size)
            if config.max_steps is None
            else config.max_steps
        )

    def batches(self, batch_index: int) -> Iterator[Batch]:
        return batches_of_rank(
            self._sequences.select(self._sample_indices(batch_index)),
            self._config,
            self._layout,
            rank=self._rank,
            world_size=self._world_size,
            device=self._device,
        )

    def target_token_count(self, batch_index: int) -> int:
        return self._sequences.select(self._sample_indices(batch_index)).target_token_count

    def token_count(self, batch_index: int) -> int:
        return self._sequences.select(self._sample_indices(batch_index)).token_count

    def epoch(self, batch_index: int) -> float:
        return self._order.epoch(batch_index, self._config.global_batch_size)

    def describe(self, batch_index: int) -> dict[str, Any]:
        """Return the indices of the batch's sequences as `samples`, their token ids as `tokens`."""
        samples = self._sample_indices(batch_index)
        tokens = [self._sequences[index]["input_ids"].tolist() for index in samples]
        return {"samples": samples, "tokens": tokens}

    def trains(self, token_id: int) -> bool:
        return self._sequences.trains(token_id)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass

    def _sample_indices(self, batch_index: int) -> list[int]:
        return self._order.indices(batch_index, self._config.global_batch_size)


def batches_of_rank(
    sequences: TokenSequences,
    config: TrainConfig,
    layout: BatchLayout,
    *,
    rank: int,
    world_size: int,
    device: torch.device | str,
) -> Iterator[Batch]:
    """Yield the micro-batches of a rank, on its device.

    Args:
        sequences: The sequences of the global batch.
        config: For `micro_batch_size` and `max_seq_len`.
        layout: Which texts may share a row, and a batch.
        rank: The rank.
        world_size: Number of ranks.
        device: Device of the batches.
    """

    def micro_batches_of(rank: int) -> list[TokenSequences]:
        own = sequences.select(np.arange(rank, len(sequences), world_size))
        return layout.training_batches(own, config.micro_batch_size, config.max_seq_len)

    micro_batches = micro_batches_of(rank)
    count = len(micro_batches)
    if not layout.packs:
        # Forward and backward passes of a sharded model are collectives, so all ranks need the
        # same number. A rank with fewer micro-batches repeats one without its labels.
        count = max(len(micro_batches_of(rank)) for rank in range(world_size))
    for index in range(count):
        is_repeated = index >= len(micro_batches)
        batch = batch_on_device(micro_batches[-1 if is_repeated else index], layout, device)
        if is_repeated:
            batch["labels"].fill_(IGNORE_INDEX)
        yield batch
