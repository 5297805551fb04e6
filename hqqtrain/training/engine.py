"""The part of a training step that depends on the strategy: gradients, their norm, the optimizer.

The strategies of PyTorch share one implementation. DeepSpeed needs another one, because it owns the
gradients and the optimizer.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

from hqqtrain.distributed.gather import LocalShard

ALL_FINITE = (-1, "")
"""Result of `Engine.first_nonfinite_gradient` if all gradients are finite."""


class Engine(Protocol):
    """Runs backward passes and optimizer steps.

    Call `model` for the forward pass. The gradients of several `backward` calls add up, averaged
    over ranks. Then call `grad_norm` and `launch_step`, and after them `step` or `skip_step`:

        for loss in losses:
            with engine.accumulating(last=loss is losses[-1]):
                engine.backward(loss)
        norm = engine.grad_norm(learning_rate)
        engine.launch_step(learning_rate, total_loss)
        # Only now does the host wait for the device.
        is_finite = math.isfinite(norm) and math.isfinite(total_loss)
        engine.step(learning_rate) if is_finite else engine.skip_step()

    DeepSpeed reveals the norm only after it has stepped. So under ZeRO-3 `grad_norm` steps already,
    and the other methods only clean up. A norm that is not finite must end the run then.
    """

    model: nn.Module

    def accumulating(self, *, last: bool) -> AbstractContextManager:
        """Return a context for the forward and backward pass of one micro-batch.

        `last` is the last micro-batch of a step; only then must gradients be averaged over ranks.
        """

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`."""

    def grad_norm(self, learning_rate: float) -> Tensor:
        """Return the gradient norm over all ranks, before clipping, as a scalar. Collective."""

    def launch_step(self, learning_rate: float, loss: Tensor) -> None:
        """Clip and step, unless `loss` or the norm is not finite, if the device can decide that.

        Otherwise do nothing, and leave the step to `step`. A step that is not taken changes neither
        parameters nor gradients.

        Args:
            learning_rate: Learning rate of the step.
            loss: The loss of all ranks, a scalar on the device.
        """

    def step(self, learning_rate: float) -> None:
        """Clip and step, unless `launch_step` has, and drop the gradients. Collective."""

    def skip_step(self) -> None:
        """Drop the gradients without a step."""

    def first_nonfinite_gradient(self) -> tuple[int, str]:
        """Return (index, name) of the parameter whose gradient became non-finite first.

        Only gradients of this rank count. The backward pass reaches the last parameter first, so
        this is the non-finite gradient with the largest index. The result is `ALL_FINITE` if all
        gradients are finite. Call it after `grad_norm` and before `step` or `skip_step`.
        """

    def local_state(self) -> dict[str, LocalShard]:
        """Return this rank's shards of all training state.

        Trainable parameters are keyed by `name`, their optimizer state by `name/key`.
        """

    @property
    def step_count(self) -> int:
        """Number of steps that the optimizer has counted."""

    def load_optimizer(self, saved: Mapping[str, Tensor], step_count: int) -> None:
        """Load the optimizer's state from saved full tensors, after `step_count` steps."""

    def scaler_state(self) -> dict[str, Any] | None:
        """Return the state of the gradient scaler as JSON; None without one."""

    def load_scaler(self, state: Mapping[str, Any] | None) -> None:
        """Load the state of the gradient scaler; do nothing with None or without a scaler."""


def all_finite(grad: Tensor) -> Tensor:
    """Return whether all elements are finite, as bool [], without a device synchronization."""
    return grad.isfinite().all()
