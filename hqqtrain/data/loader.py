"""The data loader: the micro-batches that a rank feeds to the model in each optimizer step.

A step trains on one global batch, which does not depend on the number of ranks. Rank r of n takes
its sequences r, r + n, r + 2n, ... in micro-batches of at most `micro_batch_size` sequences. The
trainer knows only the `DataLoader` protocol, so a loader that streams its data would be another
class with the same methods.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from hqqtrain.config.groups import TrainConfig
from hqqtrain.data.order import SampleOrder
from hqqtrain.data.packing import IGNORE_INDEX, TokenSequences

Batch = dict[str, Tensor]
"""The inputs of a model by name, and `labels`, each [sequences, tokens]; see `collate_batch`."""


class DataLoader(Protocol):
    """Gives each rank its part of the global batches of a training, by their index from 0."""

    total_steps: int
    """Number of optimizer steps of the training."""

    def batches(self, batch_index: int) -> Iterator[Batch]:
        """Yield this rank's micro-batches of a global batch, on the rank's device."""

    def target_token_count(self, batch_index: int) -> int:
        """Return the number of target tokens in a global batch, summed over all ranks."""

    def epoch(self, batch_index: int) -> float:
        """Return the number of passes over the data before a global batch."""

    def describe(self, batch_index: int) -> dict[str, Any]:
        """Return JSON values that show which text a global batch has, for an error report."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed loader needs in addition to the index of the batch, as JSON."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` has returned."""


class PackedLoader:
    """Loads batches of sequences that are in memory, in a shuffled order.

    Every rank has all sequences. So a global batch is a function of the seed and of its index: a
    resumed run asks for its next index, no state is saved, and ranks need not communicate.

    Args:
        sequences: The training text, the same on all ranks.
        config: Batch sizes, number of steps and seed.
        rank: This rank.
        world_size: Number of ranks; a divisor of `train.global_batch_size`.
        device: Device of the batches.
    """

    def __init__(
        self,
        sequences: TokenSequences,
        config: TrainConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self._sequences, self._device = sequences, device
        self._rank, self._world_size = rank, world_size
        self._order = SampleOrder(len(sequences), config.seed)
        self._global_batch_size = config.global_batch_size
        self._micro_batch_size = config.micro_batch_size
        self.total_steps = (
            self._order.steps(config.epochs, config.global_batch_size)
            if config.max_steps is None
            else config.max_steps
        )

    def batches(self, batch_index: int) -> Iterator[Batch]:
        indices_of_rank = self._sample_indices(batch_index)[self._rank :: self._world_size]
        size = self._micro_batch_size
        for start in range(0, len(indices_of_rank), size):
            indices = indices_of_rank[start : start + size]
            batch = collate_batch(self._sequences[index] for index in indices)
            yield {
                name: tensor.to(self._device, non_blocking=True) for name, tensor in batch.items()
            }

    def target_token_count(self, batch_index: int) -> int:
        return self._sequences.select(self._sample_indices(batch_index)).target_token_count

    def epoch(self, batch_index: int) -> float:
        return self._order.epoch(batch_index, self._global_batch_size)

    def describe(self, batch_index: int) -> dict[str, Any]:
        """Return the indices of the batch's sequences as `samples`, their token ids as `tokens`."""
        samples = self._sample_indices(batch_index)
        tokens = [self._sequences[index]["input_ids"].tolist() for index in samples]
        return {"samples": samples, "tokens": tokens}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass

    def _sample_indices(self, batch_index: int) -> list[int]:
        return self._order.indices(batch_index, self._global_batch_size)


def collate_batch(sequences: Iterable[Mapping[str, Tensor]]) -> Batch:
    """Combine sequences into a batch, int64 [sequences, longest], padded on the right.

    The batch has no attention mask. It needs none: the tokens of a text precede the padding and
    never attend to it. With a mask, transformers would not derive the texts of a sequence from
    `position_ids`.
    """
    rows = list(sequences)
    # Position 0 makes every padding token a text of its own.
    padding = {"input_ids": 0, "labels": IGNORE_INDEX, "position_ids": 0}
    return {
        name: torch.nn.utils.rnn.pad_sequence(
            [row[name] for row in rows], batch_first=True, padding_value=value
        )
        for name, value in padding.items()
    }
