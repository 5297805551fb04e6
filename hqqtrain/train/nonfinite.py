"""A loss or gradient that is not finite: which layer, which batch, and what then.

NaN spreads: a step with it makes every weight NaN, and the run's later loss says nothing of where
it came from. So it is looked at before the optimizer steps.
"""

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hqqtrain.config import TrainConfig, UserError
from hqqtrain.data import Sequences
from hqqtrain.models import plain_name
from hqqtrain.train.engine import Engine
from hqqtrain.train.evaluation import Batch
from hqqtrain.train.progress import Step
from hqqtrain.train.session import Session

logger = logging.getLogger(__name__)

LIMIT = 5
"""So many in a row end the run, whatever the policy: then it is no single batch."""
OVERFLOWS = 25
"""So many in a row are no matter of fp16's scale: it starts at 2^16, and each halves it."""


Note = Callable[[Step, dict[str, Any], list[list[int]]], object]


class Guard:
    """Follows `train.on_nonfinite`.

    `note` is given a refused step, the facts, and the tokens of its `sequences`.
    """

    def __init__(self, session: Session, sequences: Sequences, note: Note) -> None:
        self._config: TrainConfig = session.config.train
        self._session, self._sequences, self._note = session, sequences, note
        self._lr, self._in_a_row, self._overflows = session.config.optim.lr, 0, 0
        self._gradient = ""

    def accepts(self, step: Step, engine: Engine) -> bool:
        """Whether the optimizer may step. Collective where not."""
        if math.isfinite(step.loss) and math.isfinite(step.norm):
            self._overflows = 0
            if self._config.on_nonfinite != "rollback":
                self._in_a_row = 0
            return True
        if self._is_overflow(step):
            return True
        self._gradient = max(self._session.processes.gather(engine.not_finite()))[1]
        return False

    def _is_overflow(self, step: Step) -> bool:
        """Of fp16's scale, which the scaler lowers, and skips the step, by itself."""
        if self._session.accelerator.scaler is None or not math.isfinite(step.loss):
            return False
        self._overflows += 1
        return self._overflows <= OVERFLOWS

    def passed(self) -> None:
        """A checkpoint was made: what it goes back to is a later state."""
        self._in_a_row = 0

    def refuse(self, step: Step, model: nn.Module, batches: Iterable[Batch]) -> None:
        """Names the layer, keeps the batch; raises UserError where that is the end. Collective."""
        self._in_a_row += 1
        with self._session.autocast():
            forward = self._first([_first_bad_output(model, batch) for batch in batches])
        layer = forward or self._gradient or "no layer by itself"
        what = "output" if forward else "gradient"
        facts = {"layer": layer, "what": what, "policy": self._config.on_nonfinite}
        self._note(step, facts, [self._sequences[i]["input_ids"].tolist() for i in step.samples])
        said = f"loss {step.loss}, gradient norm {step.norm}; first in the {what} of {layer}"
        if self._config.on_nonfinite == "stop" or self._in_a_row >= LIMIT:
            raise UserError(
                f"train.on_nonfinite={self._config.on_nonfinite}: global batch {step.place} gives "
                f"{said}{self._how_often()}. Its samples are in nonfinite/ of the run. Lower "
                f"optim.lr={self._lr}, raise optim.warmup_steps, or use train.precision=fp32."
            )
        logger.warning(
            "train.on_nonfinite=%s: global batch %d is left out: %s",
            self._config.on_nonfinite, step.place, said,
        )  # fmt: skip

    def _how_often(self) -> str:
        return f", {self._in_a_row} times in a row" if self._in_a_row > 1 else ""

    def _first(self, found: list[str]) -> str:
        """The first name of any rank."""
        named = [name for of_rank in self._session.processes.gather(found) for name in of_rank]
        return next(filter(None, named), "")


@torch.no_grad()
def _first_bad_output(model: nn.Module, batch: Batch) -> str:
    """The first module to give what is not finite in a forward pass; nothing where none does."""
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            floats = (t for t in tensors if isinstance(t, Tensor) and t.is_floating_point())
            if not found and not all(bool(t.isfinite().all()) for t in floats):
                found.append(plain_name(name.removeprefix("module.")))  # of DDP

        return hook

    named = [(name, module) for name, module in model.named_modules() if name]
    hooks = [module.register_forward_hook(look(name)) for name, module in named]
    try:
        model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False)
    finally:
        for handle in hooks:
            handle.remove()
    return found[0] if found else ""
