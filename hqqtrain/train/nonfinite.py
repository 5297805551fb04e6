"""Find the layer and the batch of a loss or gradient that is not finite, and apply the policy.

NaN spreads: one optimizer step with it makes every weight NaN, and the later loss does not show
where it came from. So the check runs before the optimizer steps.
"""

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hqqtrain.common.errors import UserError
from hqqtrain.config.groups import TrainConfig
from hqqtrain.data.packing import TokenSequences
from hqqtrain.distributed.runtime import Runtime
from hqqtrain.evaluation.perplexity import Batch
from hqqtrain.models.fqn import strip_wrappers
from hqqtrain.train.engine import Engine
from hqqtrain.train.state import StepResult

logger = logging.getLogger(__name__)

MAX_REFUSED_IN_A_ROW = 5
"""Refused steps in a row that end the run under every policy: no single batch is the cause."""

MAX_OVERFLOWS_IN_A_ROW = 25
"""Overflows in a row that fp16 scaling can explain: the scale starts at 2^16 and is halved."""

Note = Callable[[StepResult, dict[str, Any], list[list[int]]], object]
"""Records a refused step: (step, facts as JSON values, token ids of its sequences)."""


class NonFiniteGuard:
    """Applies `train.on_nonfinite` to steps whose loss or gradient norm is not finite.

    Args:
        session: Configuration and ranks.
        sequences: The training text, to look up the tokens of a refused batch.
        note: Records a refused step.
    """

    def __init__(self, runtime: Runtime, sequences: TokenSequences, note: Note) -> None:
        self._config: TrainConfig = runtime.config.train
        self._runtime, self._sequences, self._note = runtime, sequences, note
        self._lr, self._in_a_row, self._overflows = runtime.config.optim.lr, 0, 0
        self._gradient = ""

    def accepts(self, step: StepResult, engine: Engine) -> bool:
        """Whether the optimizer may step. Collective if not."""
        if math.isfinite(step.loss) and math.isfinite(step.norm):
            self._overflows = 0
            if self._config.on_nonfinite != "rollback":
                self._in_a_row = 0
            return True
        if self._is_overflow(step):
            return True
        # The backward pass reaches the last parameter first: over ranks, the largest index wins.
        self._gradient = max(self._runtime.comm.gather(engine.not_finite()))[1]
        return False

    def _is_overflow(self, step: StepResult) -> bool:
        """Whether this is an fp16 loss-scale overflow. Counts them.

        GradScaler handles an overflow by skipping the step and lowering the scale.
        """
        if self._runtime.accelerator.scaler is None or not math.isfinite(step.loss):
            return False
        self._overflows += 1
        return self._overflows <= MAX_OVERFLOWS_IN_A_ROW

    def passed(self) -> None:
        """Reset the count of refused steps, because a checkpoint was made after them."""
        self._in_a_row = 0

    def refuse(self, step: StepResult, model: nn.Module, batches: Iterable[Batch]) -> None:
        """Find the layer, record the batch, and skip it or end the run. Collective.

        Args:
            step: The refused step.
            model: The model to run again, as the engine calls it.
            batches: This rank's micro-batches of the step.

        Raises:
            UserError: The policy is `stop`, or too many steps in a row were refused.
        """
        self._in_a_row += 1
        with self._runtime.autocast():
            forward = self._first([_first_bad_output(model, batch) for batch in batches])
        layer = forward or self._gradient or "no layer by itself"
        what = "output" if forward else "gradient"
        facts = {"layer": layer, "what": what, "policy": self._config.on_nonfinite}
        self._note(step, facts, [self._sequences[i]["input_ids"].tolist() for i in step.samples])
        cause = f"loss {step.loss}, gradient norm {step.norm}; first in the {what} of {layer}"
        if self._config.on_nonfinite == "stop" or self._in_a_row >= MAX_REFUSED_IN_A_ROW:
            raise UserError(
                f"train.on_nonfinite={self._config.on_nonfinite}: global batch {step.place} gives "
                f"{cause}{self._how_often()}. Its samples are in nonfinite/ of the run. Lower "
                f"optim.lr={self._lr}, raise optim.warmup_steps, or use train.precision=fp32."
            )
        logger.warning(
            "train.on_nonfinite=%s: global batch %d is skipped: %s",
            self._config.on_nonfinite, step.place, cause,
        )  # fmt: skip

    def _how_often(self) -> str:
        return f", {self._in_a_row} times in a row" if self._in_a_row > 1 else ""

    def _first(self, found: list[str]) -> str:
        """Return the first name that is not empty, over all batches of all ranks. Collective."""
        named = [name for of_rank in self._runtime.comm.gather(found) for name in of_rank]
        return next(filter(None, named), "")


@torch.no_grad()
def _first_bad_output(model: nn.Module, batch: Batch) -> str:
    """Return the first module whose output is not finite in a forward pass; empty if none."""
    found: list[str] = []

    def make_hook(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            floats = (t for t in tensors if isinstance(t, Tensor) and t.is_floating_point())
            if not found and not all(bool(t.isfinite().all()) for t in floats):
                found.append(strip_wrappers(name.removeprefix("module.")))  # DDP's prefix

        return hook

    named = [(name, module) for name, module in model.named_modules() if name]
    hooks = [module.register_forward_hook(make_hook(name)) for name, module in named]
    try:
        model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False)
    finally:
        for handle in hooks:
            handle.remove()
    return found[0] if found else ""
