"""The best evaluation of a training so far, for early stopping and for the best checkpoint."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class BestEvaluation:
    """The evaluation with the lowest held-out loss. Every checkpoint contains it.

    Attributes:
        step: Number of the optimizer step after which it was made; None before the first one. With
            equal losses, the later step counts as better, as for `ckpt.keep_best`.
        loss: Its loss, in nats per token.
        without_improvement: Number of evaluations since the last one that lowered the loss.
        last_step: Step of the last evaluation that was counted.
    """

    step: int | None = None
    loss: float | None = None
    without_improvement: int = 0
    last_step: int = -1

    def add(self, step: int, loss: float) -> None:
        """Count an evaluation; one that a resumed run repeats is not counted again."""
        if step <= self.last_step:
            return
        self.last_step = step
        improves = math.isfinite(loss) and (self.loss is None or loss < self.loss)
        self.without_improvement = 0 if improves else self.without_improvement + 1
        if improves or loss == self.loss:
            self.step, self.loss = step, loss

    def stall_reason(self, patience: int | None) -> str | None:
        """Return why training stops early, or None if it continues.

        Args:
            patience: The value of train.early_stopping_patience; None never stops it.
        """
        if patience is None or self.without_improvement < patience:
            return None
        return (
            f"stopped early after step {self.last_step}: {self.without_improvement} evaluations in "
            f"a row have not lowered eval/loss, which is {self.loss} after step {self.step}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state; an empty one, from an earlier release, means no evaluation yet."""
        vars(self).update(asdict(BestEvaluation(**state)))
