"""The part of a training step that depends on the strategy: gradients, their norm, the optimizer.

The strategies of PyTorch share one implementation. DeepSpeed needs another one, because it owns the
gradients and the optimizer.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor, nn

from hqqtrain.distributed.gather import LocalShard

Accepts = Callable[[float], bool]
"""Decides from the gradient norm whether the optimizer may step."""

ALL_FINITE = (-1, "")
"""Result of `Engine.not_finite` if all gradients are finite."""


class Engine(Protocol):
    """Runs backward passes and optimizer steps.

    Call `model` for the forward pass. The gradients of several `backward` calls add up, averaged
    over ranks, until `update`.
    """

    model: nn.Module

    def accumulation_context(self, *, last: bool) -> AbstractContextManager:
        """Context for forward and backward of one micro-batch; `last` is the last one of a step."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`."""

    def update(self, rate: float, accepts: Accepts) -> None:
        """Clip the gradients and step, or drop the gradients if `accepts` refuses. Collective.

        Args:
            rate: Learning rate of the step.
            accepts: Called with the gradient norm over all ranks, before clipping.
        """

    def not_finite(self) -> tuple[int, str]:
        """Return (index, name) of the last parameter whose gradient is not finite on this rank.

        The backward pass reaches the last parameter first, so its gradient is closest to the cause.
        The result is `ALL_FINITE` if all gradients are finite. Valid within `accepts` only.
        """

    def pieces(self) -> dict[str, LocalShard]:
        """Return this rank's shards of all training state.

        Trained parameters are keyed by `name`, their optimizer state by `name/key`.
        """

    @property
    def updates(self) -> int:
        """Number of steps that the optimizer has counted."""

    def load_optimizer(self, saved: Mapping[str, Tensor], updates: int) -> None:
        """Load the optimizer's state from saved tensors, after `updates` steps."""


def all_finite(grad: Tensor) -> Tensor:
    """Return bool [], without synchronizing with the device."""
    return grad.isfinite().all()
