"""Progress of a training, and the outcome of one step."""

import math
from dataclasses import dataclass


@dataclass
class StepResult:
    """One global batch and its outcome.

    `loss` is the mean over the batch's `tokens` in nats, `norm` the gradient norm over all ranks.
    """

    number: int
    """Number of the optimizer step, from 1. A skipped batch has the number of the next step."""
    place: int
    """Position in the data, in global batches from 0."""
    samples: list[int]
    """Indices of the batch's sequences."""
    tokens: int
    loss: float
    norm: float = math.nan
    taken: bool = False
    """Whether the optimizer has stepped."""


@dataclass
class TrainState:
    """Progress of a training. A checkpoint has all of it."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """Training time, summed over all starts of the run."""
    loss: float | None = None
    """Loss of the last step."""
    skipped: int = 0
    """Number of global batches that were skipped."""

    @property
    def place(self) -> int:
        """Position of the next global batch."""
        return self.steps + self.skipped

    def add(self, step: StepResult, seconds: float) -> None:
        """Count one optimizer step."""
        self.steps += 1
        self.tokens += step.tokens
        self.seconds += seconds
        self.loss = step.loss
