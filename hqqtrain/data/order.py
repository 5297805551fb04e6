"""Choose the samples of an optimizer step, as a pure function of seed and step.

No iterator is consumed, so no state needs saving: a resumed run asks for its next step. The global
batch is the same for any number of processes.
"""

from fractions import Fraction
from functools import lru_cache
from math import ceil

import numpy as np


class SampleOrder:
    """The order of `sample_count` samples, with a new shuffle for every epoch.

    Epochs follow each other without a gap: a batch may contain the end of one epoch and the start
    of the next.
    """

    def __init__(self, sample_count: int, seed: int) -> None:
        assert sample_count > 0
        self.sample_count, self.seed = sample_count, seed

    def indices(self, step: int, global_batch_size: int) -> list[int]:
        """Return the indices of the samples of optimizer step `step`, which counts from 0."""
        indices = []
        start = step * global_batch_size
        # All epochs form one endless sequence, of which a step takes the next positions.
        for position in range(start, start + global_batch_size):
            epoch, index_in_epoch = divmod(position, self.sample_count)
            order = permutation(self.sample_count, self.seed, epoch)
            indices.append(int(order[index_in_epoch]))
        return indices

    def epoch(self, steps: int, global_batch_size: int) -> float:
        """Return the number of passes over the data after `steps` optimizer steps."""
        return steps * global_batch_size / self.sample_count

    def steps(self, epochs: float, global_batch_size: int) -> int:
        """Return the smallest number of optimizer steps that cover `epochs` passes."""
        # The decimal number that the user wrote: 1.1 as a float is above it and would add a step.
        return ceil(Fraction(repr(float(epochs))) * self.sample_count / global_batch_size)


@lru_cache(maxsize=4)
def permutation(sample_count: int, seed: int, epoch: int) -> np.ndarray:
    """Return the shuffled indices of one epoch, int64 [sample_count].

    They are the same with every release of numpy, which guarantees that the numbers of RandomState
    never change; those of Generator may.
    """
    bit_generator = np.random.MT19937(np.random.SeedSequence((seed, epoch)))
    return np.random.RandomState(bit_generator).permutation(sample_count)
