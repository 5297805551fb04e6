"""How far a training is, and what one step of it was."""

import math
from dataclasses import dataclass


@dataclass
class Step:
    """One global batch: `loss` is the mean over its `tokens`, nats; `norm` of the gradient."""

    number: int
    """Counted from 1; one that is not taken has the number of the next that is."""
    place: int
    """In the data, counted in global batches from 0."""
    samples: list[int]
    tokens: int
    loss: float
    norm: float = math.nan
    taken: bool = False
    """False where the optimizer did not step."""


@dataclass
class Trained:
    """What a training leaves beside the weights; all of it is in a checkpoint."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """Of all processes that had a part in it."""
    loss: float | None = None
    """Of the last step."""
    skipped: int = 0
    """Global batches that were left out."""

    @property
    def place(self) -> int:
        """The next global batch."""
        return self.steps + self.skipped

    def add(self, step: Step, seconds: float) -> None:
        self.steps += 1
        self.tokens += step.tokens
        self.seconds += seconds
        self.loss = step.loss
