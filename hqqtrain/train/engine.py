"""What a strategy does around a step: gradients over ranks, their norm, the optimizer.

Torch's strategies share one way; DeepSpeed keeps gradients and optimizer to itself.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor, nn

from hqqtrain.dist import Piece

Accepts = Callable[[float], bool]

FINITE = (-1, "")
"""What `not_finite` finds where all is well."""


class Engine(Protocol):
    """`model` is what a batch is given to. Gradients of several `backward` add up, averaged over
    ranks, until `update`."""

    model: nn.Module

    def accumulating(self, *, last: bool) -> AbstractContextManager:
        """Around forward and backward of one batch, the last of a step or not."""

    def backward(self, loss: Tensor) -> None: ...

    def update(self, rate: float, accepts: Accepts) -> None:
        """Clips and steps, or forgets the gradients where `accepts` refuses their norm.

        `accepts` is told the norm over all ranks before it is clipped. Collective.
        """

    def not_finite(self) -> tuple[int, str]:
        """(number, name) of the last parameter, where a backward pass begins, whose gradient is
        not finite on this rank; (-1, "") without one. For `accepts` to ask."""

    def pieces(self) -> dict[str, Piece]:
        """This rank's pieces of what is trained, by name, and of the optimizer: `name/key`."""

    @property
    def updates(self) -> int:
        """How many the optimizer counts."""

    def load_optimizer(self, saved: Mapping[str, Tensor], updates: int) -> None:
        """Puts back the optimizer's state, by its whole tensors."""


def is_finite(grad: Tensor) -> Tensor:
    """Without waiting for the value."""
    return grad.isfinite().all()
