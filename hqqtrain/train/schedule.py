"""The learning rate of each optimizer step.

transformers' schedules are not used, because they start at a rate of 0, which wastes the first
step. The rate depends on the step only, so no state is saved.
"""

import logging
import math
from dataclasses import dataclass

from hqqtrain.config.groups import OptimConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LearningRateSchedule:
    """The schedule of `optim` over `total_steps` steps.

    The rate warms up linearly over `optim.warmup_steps`, then decays to zero at the last step by a
    cosine or linearly, or stays constant.
    """

    optim: OptimConfig
    total_steps: int

    def __post_init__(self) -> None:
        if 0 < self.total_steps <= self.optim.warmup_steps:
            logger.warning(
                "optim.warmup_steps=%d: the run has %d steps, so it never reaches optim.lr",
                self.optim.warmup_steps, self.total_steps,
            )  # fmt: skip

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of optimizer step `step`, counted from 0."""
        optim = self.optim
        if step < optim.warmup_steps:
            return optim.lr * (step + 1) / optim.warmup_steps
        decay_steps = max(1, self.total_steps - optim.warmup_steps)
        left = max(0.0, 1 - (step - optim.warmup_steps) / decay_steps)
        if optim.schedule == "cosine":
            return optim.lr * 0.5 * (1 - math.cos(math.pi * left))
        return optim.lr * left if optim.schedule == "linear" else optim.lr
