"""Which samples an optimizer step sees: a pure function of seed and step.

Nothing is consumed and nothing needs saving: a resumed run asks for its next step, and one
process or sixty-four share the same global batch.
"""

from functools import lru_cache
from math import ceil

import numpy as np


class SampleOrder:
    """The order of `n` samples, shuffled anew for every epoch; epochs follow without a gap.

    A batch may hold the end of one epoch and the start of the next.
    """

    def __init__(self, n: int, seed: int) -> None:
        assert n > 0
        self.n, self.seed = n, seed

    def indices(self, step: int, global_batch_size: int) -> list[int]:
        """The samples of optimizer step `step`, counted from 0."""
        first = step * global_batch_size
        return [self._at(place) for place in range(first, first + global_batch_size)]

    def epoch(self, steps: int, global_batch_size: int) -> float:
        """Passes over the data after `steps` optimizer steps."""
        return steps * global_batch_size / self.n

    def steps(self, epochs: float, global_batch_size: int) -> int:
        """Optimizer steps that show `epochs` passes over the data at least, one step at least."""
        return max(1, ceil(epochs * self.n / global_batch_size))

    def _at(self, place: int) -> int:
        return int(_permutation(self.n, self.seed, place // self.n)[place % self.n])


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    # numpy promises RandomState's streams for good; those of its new Generator may change.
    bits = np.random.MT19937(np.random.SeedSequence((seed, epoch)))
    return np.random.RandomState(bits).permutation(n)
