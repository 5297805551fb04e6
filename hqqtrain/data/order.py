"""The samples of an optimizer step, as a pure function of seed and step.

No iterator is consumed and no state needs saving. A resumed run asks for its next step, and any
number of processes, one or sixty-four, shares the same global batch.
"""

from functools import lru_cache
from math import ceil

import numpy as np


class SampleOrder:
    """The order of `n` samples, with a new shuffle for every epoch.

    Epochs follow each other without a gap: a batch may contain the end of one epoch and the start
    of the next.
    """

    def __init__(self, n: int, seed: int) -> None:
        assert n > 0
        self.n, self.seed = n, seed

    def indices(self, step: int, global_batch_size: int) -> list[int]:
        """Return the samples of optimizer step `step`, which counts from 0."""
        first = step * global_batch_size
        # Positions in the endless sequence of epochs, as (epoch, index within the epoch).
        places = (divmod(position, self.n) for position in range(first, first + global_batch_size))
        return [int(_permutation(self.n, self.seed, epoch)[index]) for epoch, index in places]

    def epoch(self, steps: int, global_batch_size: int) -> float:
        """Return the number of passes over the data after `steps` optimizer steps."""
        return steps * global_batch_size / self.n

    def steps(self, epochs: float, global_batch_size: int) -> int:
        """Return the smallest number of optimizer steps, at least 1, that cover `epochs` passes."""
        return max(1, ceil(epochs * self.n / global_batch_size))


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    # numpy guarantees that streams of RandomState never change; those of Generator may.
    bits = np.random.MT19937(np.random.SeedSequence((seed, epoch)))
    return np.random.RandomState(bits).permutation(n)
