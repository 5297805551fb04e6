"""The engine of the strategy `zero3`. DeepSpeed itself clips, steps and drops the gradients."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hqqtrain.compat import zero3_shape
from hqqtrain.config.groups import OptimConfig
from hqqtrain.distributed.gather import LocalShard, local_shard_of
from hqqtrain.distributed.strategies import zero3
from hqqtrain.distributed.strategies.zero3 import build_deepspeed_engine
from hqqtrain.training.engine import ALL_FINITE, all_finite
from hqqtrain.training.optimizer import build_optimizer, set_learning_rate


class ZeRO3Engine:
    """Implements `Engine` with DeepSpeed.

    Args:
        model: The model, sharded by ZeRO-3 already.
        trainables: The trainable parameters of `model` by name.
        optim: Settings of the optimizer.
        autocast: Dtype of matrix products; fp32 for no autocast.
        device: Device of this rank.
        max_grad_norm: Largest gradient norm, above which gradients are clipped; None: no clipping.
    """

    def __init__(
        self,
        model: nn.Module,
        trainables: Mapping[str, nn.Parameter],
        optim: OptimConfig,
        *,
        autocast: torch.dtype,
        device: torch.device,
        max_grad_norm: float | None = None,
    ) -> None:
        self._trainables = trainables
        self._optimizer = build_optimizer(optim, trainables.values(), fused=False)
        self.model: Any = build_deepspeed_engine(
            model, self._optimizer, max_grad_norm=max_grad_norm, autocast=autocast
        )
        # DeepSpeed takes each gradient away as soon as it is computed, so a hook must check it.
        self._is_nonfinite = torch.zeros(len(trainables), dtype=torch.bool, device=device)
        for index, param in enumerate(trainables.values()):
            param.register_hook(partial(self._check_gradient, index))

    def _check_gradient(self, index: int, grad: Tensor) -> None:
        """Remember a gradient that is not finite, without a device synchronization."""
        self._is_nonfinite[index] |= ~all_finite(grad)

    def accumulating(self, *, last: bool) -> AbstractContextManager:
        self.model.set_gradient_accumulation_boundary(is_boundary=last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss)

    def grad_norm(self, learning_rate: float) -> Tensor:
        """Step, then return the norm, which DeepSpeed reveals only after it has stepped.

        Collective. The caller must end the run if the norm is not finite, because it is too late to
        skip the step.
        """
        set_learning_rate(self._optimizer, learning_rate)
        self.model.step()
        return torch.as_tensor(self.model.get_global_grad_norm())

    def launch_step(self, learning_rate: float, loss: Tensor) -> None:
        """Do nothing, because `grad_norm` has stepped already."""

    def step(self, learning_rate: float) -> None:
        """Only clean up, because `grad_norm` has stepped already."""
        self._is_nonfinite.zero_()

    def skip_step(self) -> None:
        """Only clean up. The step cannot be skipped, because `grad_norm` has taken it."""
        self._is_nonfinite.zero_()

    def first_nonfinite_gradient(self) -> tuple[int, str]:
        flags = self._is_nonfinite.tolist()
        for index, name in reversed(list(enumerate(self._trainables))):
            if flags[index]:
                return index, name
        return ALL_FINITE

    def local_state(self) -> dict[str, LocalShard]:
        shards = {}
        for name, param in self._trainables.items():
            # The empty key stands for the parameter itself, the others for its moments.
            for key, tensor in zero3.local_training_state(self.model, param).items():
                shard = local_shard_of(param, tensor, zero3_shape(param))
                shards[f"{name}/{key}" if key else name] = shard
        return shards

    @property
    def step_count(self) -> int:
        return zero3.optimizer_step_count(self.model)

    def load_optimizer(self, saved: Mapping[str, Tensor], step_count: int) -> None:
        if not step_count:
            return
        moments: dict[Tensor, dict[str, Tensor]] = {
            param: {key: saved[f"{name}/{key}"] for key in zero3.MOMENTS}
            for name, param in self._trainables.items()
        }
        zero3.load_moments(self.model, step_count, moments)

    def scaler_state(self) -> dict[str, Any] | None:
        return None  # gradients are not scaled under ZeRO-3

    def load_scaler(self, state: Mapping[str, Any] | None) -> None:
        pass
