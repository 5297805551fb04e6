"""Find the layer and the batch of a loss or gradient that is not finite, and apply the policy.

NaN spreads: one optimizer step with it makes every weight NaN, and the later loss does not show
where it came from. So the check runs before the optimizer steps.
"""

import logging
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hqqtrain.common.errors import UserError
from hqqtrain.data.layout import Batch
from hqqtrain.distributed.comm import Communicator
from hqqtrain.models.causal_lm import model_inputs
from hqqtrain.models.fqn import strip_wrappers
from hqqtrain.training.state import StepResult

logger = logging.getLogger(__name__)

MAX_REFUSED_IN_A_ROW = 5
"""Number of refused steps in a row that ends the run under every policy.

After so many, a single bad batch cannot be the cause.
"""

MAX_OVERFLOWS_IN_A_ROW = 25
"""Largest number of overflows in a row that are left to fp16's gradient scaler.

The scale starts at 2^16 and each overflow halves it, so 25 overflows lower it to 2^-9. Gradients
that still overflow are not finite for another reason.
"""

RecordRefusal = Callable[[StepResult, dict[str, Any]], object]
"""Records a refused step: (step, its cause as JSON values)."""


class NonFiniteGuard:
    """Applies `train.on_nonfinite` to steps whose loss or gradient norm is not finite.

    Args:
        policy: `train.on_nonfinite`.
        comm: All ranks of the run.
        record_refusal: Records a refused step.
        scales_gradients: Whether fp16's gradient scaler skips steps that overflow.
        autocast: Makes the context of the forward pass.
        lr: `optim.lr`, for the error message.
        advice: Where the batch of the error message can be found.
    """

    def __init__(
        self,
        policy: str,
        comm: Communicator,
        record_refusal: RecordRefusal,
        *,
        scales_gradients: bool = False,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        lr: float = 0.0,
        advice: str = "Its samples are in nonfinite/ of the run.",
    ) -> None:
        self._policy, self._comm, self._record_refusal = policy, comm, record_refusal
        self._scales_gradients, self._autocast, self._lr = scales_gradients, autocast, lr
        self._advice = advice
        self._refused_in_a_row = self._overflows_in_a_row = 0

    @property
    def rolls_back(self) -> bool:
        """Whether the run returns to the last checkpoint after a refused step."""
        return self._policy == "rollback"

    def allows_step(self, step: StepResult) -> bool:
        """Decide whether the optimizer may step, and count overflows; the same on all ranks."""
        if math.isfinite(step.loss) and math.isfinite(step.grad_norm):
            self._overflows_in_a_row = 0
            # After a rollback, steps up to the refused one are repeated and succeed. So only a new
            # checkpoint resets the count then; see `checkpoint_saved`.
            if not self.rolls_back:
                self._refused_in_a_row = 0
            return True
        # GradScaler handles an overflow of fp16: it skips the step and lowers the scale.
        if self._scales_gradients and math.isfinite(step.loss):
            self._overflows_in_a_row += 1
            if self._overflows_in_a_row <= MAX_OVERFLOWS_IN_A_ROW:
                return True
        return False

    def handle_refused(
        self, step: StepResult, gradient: tuple[int, str], model: nn.Module,
        batches: Iterable[Batch],
    ) -> None:  # fmt: skip
        """Find the layer and record the batch. Return if the batch is to be skipped. Collective.

        Args:
            step: The step that `allows_step` has refused.
            gradient: `Engine.first_nonfinite_gradient` of this rank.
            model: The model to run again, as the engine calls it.
            batches: This rank's micro-batches of the step.

        Raises:
            UserError: The policy is `stop`, or too many steps in a row were refused.
        """
        self._refused_in_a_row += 1
        with self._autocast():
            outputs = [first_nonfinite_output(model, batch) for batch in batches]
        layer, kind = self._find_cause(outputs, gradient)
        self._record_refusal(step, {"layer": layer, "what": kind, "policy": self._policy})
        cause = f"loss {step.loss}, gradient norm {step.grad_norm}; first in the {kind} of {layer}"
        times = self._refused_in_a_row
        if self._policy == "stop" or times >= MAX_REFUSED_IN_A_ROW:
            how_often = f", {times} times in a row" if times > 1 else ""
            raise UserError(
                f"train.on_nonfinite={self._policy}: global batch {step.batch_index} gives "
                f"{cause}{how_often}. {self._advice} Lower "
                f"optim.lr={self._lr}, raise optim.warmup_steps, or use train.precision=fp32."
            )
        logger.warning(
            "train.on_nonfinite=%s: global batch %d is skipped: %s",
            self._policy, step.batch_index, cause,
        )  # fmt: skip

    def _find_cause(self, outputs: list[str], gradient: tuple[int, str]) -> tuple[str, str]:
        """Return the first layer with a value that is not finite, and `output` or `gradient`.

        Collective. Every output precedes every gradient.

        Args:
            outputs: `first_nonfinite_output` of each micro-batch of this rank.
            gradient: `Engine.first_nonfinite_gradient` of this rank.
        """
        layers = [
            layer for of_rank in self._comm.all_gather_object(outputs) for layer in of_rank if layer
        ]
        # The backward pass reaches the last parameter first, so the largest index is the first.
        _, parameter = max(self._comm.all_gather_object(gradient))
        if layers:
            return layers[0], "output"
        return parameter or "no layer by itself", "gradient"

    def checkpoint_saved(self) -> None:
        """Reset the count of refused steps: a rollback no longer repeats the steps before them."""
        self._refused_in_a_row = 0


@torch.no_grad()
def first_nonfinite_output(model: nn.Module, batch: Batch) -> str:
    """Return the name of the first module whose output is not finite; empty if there is none.

    The model runs forward once on `batch`.
    """
    nonfinite: list[str] = []

    def make_hook(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            floats = (t for t in tensors if isinstance(t, Tensor) and t.is_floating_point())
            if not nonfinite and not all(bool(t.isfinite().all()) for t in floats):
                nonfinite.append(strip_wrappers(name.removeprefix("module.")))  # DDP's prefix

        return hook

    handles = [
        module.register_forward_hook(make_hook(name))
        for name, module in model.named_modules()
        if name  # not the model itself
    ]
    try:
        model(**model_inputs(model, batch), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return nonfinite[0] if nonfinite else ""
