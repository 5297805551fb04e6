"""The engine of `zero3`: DeepSpeed clips, steps and drops the gradients itself."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hqqtrain.distributed.gather import LocalShard, local_shard_of
from hqqtrain.distributed.runtime import Runtime
from hqqtrain.distributed.strategies import zero3
from hqqtrain.distributed.strategies.zero3 import build_deepspeed_engine
from hqqtrain.train.engine import ALL_FINITE, Accepts, all_finite
from hqqtrain.train.optimizer import build_optimizer, set_learning_rate


class ZeRO3Engine:
    """Implements `Engine` with DeepSpeed."""

    def __init__(self, model: nn.Module, trained: Mapping[str, nn.Parameter],
                 runtime: Runtime) -> None:  # fmt: skip
        self._trained = trained
        self._optimizer = build_optimizer(runtime.config.optim, trained.values())
        self.model: Any = build_deepspeed_engine(
            model, self._optimizer, max_grad_norm=runtime.config.train.max_grad_norm,
            autocast=runtime.dtype,
        )  # fmt: skip
        # DeepSpeed takes each gradient away once it is computed, so look at it in a hook.
        self._is_bad = torch.zeros(len(trained), dtype=torch.bool, device=runtime.device)
        for number, param in enumerate(trained.values()):
            param.register_hook(partial(self._look, number))

    def _look(self, number: int, grad: Tensor) -> None:
        """Note a gradient that is not finite, without synchronizing with the device."""
        self._is_bad[number] |= ~all_finite(grad)

    def accumulation_context(self, *, last: bool) -> AbstractContextManager:
        self.model.set_gradient_accumulation_boundary(is_boundary=last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss)

    def update(self, rate: float, accepts: Accepts) -> None:
        """Step, then report the norm. Collective.

        DeepSpeed reveals the norm only after it has stepped, so a refusal must end the run.
        """
        set_learning_rate(self._optimizer, rate)
        self.model.step()
        norm: torch.Tensor | float = self.model.get_global_grad_norm()
        accepts(float(norm))
        self._is_bad.zero_()

    def not_finite(self) -> tuple[int, str]:
        flags = zip(enumerate(self._trained), self._is_bad.tolist(), strict=True)
        return max((named for named, bad in flags if bad), default=ALL_FINITE)

    def pieces(self) -> dict[str, LocalShard]:
        made = {}
        for name, param in self._trained.items():
            for key, part in zero3.local_training_state(self.model, param).items():
                shape = param.ds_shape  # type: ignore[attr-defined]
                made[f"{name}/{key}" if key else name] = local_shard_of(param, part, shape)
        return made

    @property
    def updates(self) -> int:
        return zero3.optimizer_step_count(self.model)

    def load_optimizer(self, saved: Mapping[str, Tensor], updates: int) -> None:
        moments: dict[Tensor, dict[str, Tensor]] = {
            param: {key: saved[f"{name}/{key}"] for key in zero3.MOMENTS}
            for name, param in self._trained.items() if updates
        }  # fmt: skip
        if updates:
            zero3.load_moments(self.model, updates, moments)
