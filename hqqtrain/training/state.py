"""Progress of a training, and the outcome of one step."""

import math
from dataclasses import dataclass


@dataclass
class StepResult:
    """The outcome of one global batch, the same on all ranks except for `seconds`.

    Attributes:
        number: Number of the optimizer step, from 1. If the step is not taken, the next one has
            the same number.
        batch_index: Index of the global batch in the data, from 0.
        tokens: Tokens that the loss predicts, over all ranks.
        loss: Mean over these tokens, in nats.
        learning_rate: Learning rate of the step.
        peak_memory_gib: Largest peak memory of any rank up to the backward pass of this step. It
            includes the state of the optimizer from the second step on, because the first step
            allocates this state.
        grad_norm: Gradient norm over all ranks, before clipping.
        seconds: Duration of the step on this rank.
        all_tokens: Tokens that the model reads, over all ranks: in chats also the prompts.
        was_taken: Whether the optimizer has stepped.
    """

    number: int
    batch_index: int
    tokens: int
    loss: float
    learning_rate: float = 0.0
    peak_memory_gib: float = 0.0
    grad_norm: float = math.nan
    seconds: float = 0.0
    all_tokens: int = 0
    was_taken: bool = False


@dataclass
class TrainState:
    """Progress of a training, which every checkpoint contains."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """Training time, summed over all processes of the run."""
    loss: float | None = None
    """Loss of the last step."""
    skipped: int = 0
    """Number of global batches that were skipped."""

    @property
    def next_batch_index(self) -> int:
        """Index of the next global batch in the data."""
        return self.steps + self.skipped

    def add(self, step: StepResult) -> None:
        """Count an optimizer step that was taken."""
        self.steps += 1
        self.tokens += step.tokens
        self.seconds += step.seconds
        self.loss = step.loss

    def skip_to(self, batch_index: int) -> None:
        """Skip all global batches before `batch_index`."""
        self.skipped = batch_index - self.steps
