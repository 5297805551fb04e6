"""The engine of PyTorch's strategies: `single`, `ddp`, `fsdp2` and `fsdp1`.

Under `fsdp1`, DDP averages the gradients of the trainable parameters, which FSDP1 does not shard.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from hqqtrain.compat import ignore_under_ddp
from hqqtrain.config.groups import OptimConfig
from hqqtrain.distributed.gather import LocalShard, local_shard_of
from hqqtrain.distributed.local import local_tensor
from hqqtrain.training.engine import ALL_FINITE, all_finite
from hqqtrain.training.optimizer import build_optimizer, set_learning_rate
from hqqtrain.training.optimizer_state import OptimizerState


class TorchEngine:
    """Implements `Engine` with PyTorch and accelerate.

    Args:
        model: The model, sharded already if the strategy shards it.
        trainables: The trainable parameters of `model` by name.
        accelerator: Scales gradients under fp16.
        optim: Settings of the optimizer.
        max_grad_norm: Largest gradient norm, above which gradients are clipped; None: no clipping.
        uses_ddp: Whether DDP averages the gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        trainables: Mapping[str, nn.Parameter],
        accelerator: Accelerator,
        optim: OptimConfig,
        *,
        max_grad_norm: float | None = None,
        uses_ddp: bool = False,
    ) -> None:
        self.model, self._trainables = model, trainables
        self._accelerator, self._max_grad_norm = accelerator, max_grad_norm
        if uses_ddp:
            if hosted := [n for n, p in model.named_parameters() if _stays_on_host(p, trainables)]:
                ignore_under_ddp(model, hosted)
            # All ranks start with equal weights. DDP's initial broadcast would overwrite the
            # shards of FSDP1, so it is off.
            self.model = DistributedDataParallel(model, init_sync=False, broadcast_buffers=False)
        optimizer: Any = build_optimizer(optim, trainables.values())
        # Fused AdamW can decide on the device not to step; under fp16, GradScaler uses that itself.
        can_decide = isinstance(optimizer, AdamW) and accelerator.scaler is None
        self._deciding_adamw: Any = optimizer if can_decide else None
        self._state = OptimizerState(optimizer, trainables)
        self._optimizer = accelerator.prepare_optimizer(optimizer)
        # Total norm of the current gradients, before clipping.
        self._norm: Tensor | None = None
        self._is_launched = False

    def accumulating(self, *, last: bool) -> AbstractContextManager:
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    def grad_norm(self, learning_rate: float) -> Tensor:
        self._accelerator.unscale_gradients(self._optimizer)
        grads = [p.grad for p in self._trainables.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        self._norm = norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return norm

    def launch_step(self, learning_rate: float, loss: Tensor) -> None:
        norm, adamw = self._norm, self._deciding_adamw
        assert norm is not None, "call `grad_norm` first"
        # With parallel.offload=parameters, gradients are in host memory and the loss is not.
        if adamw is None or norm.device != loss.device:
            return
        adamw.found_inf = (~(norm.isfinite() & loss.isfinite())).float()
        if self._max_grad_norm is not None:
            # AdamW divides the gradients by it, so that clipping needs no pass of its own.
            adamw.grad_scale = ((norm + 1e-6) / self._max_grad_norm).clamp(min=1.0).float()
        set_learning_rate(self._optimizer, learning_rate)
        self._optimizer.step()
        adamw.found_inf = adamw.grad_scale = None
        self._is_launched = True

    def step(self, learning_rate: float) -> None:
        if self._is_launched:
            self._drop_gradients()
            return
        assert self._norm is not None, "call `grad_norm` first"
        if self._max_grad_norm is not None:
            parameters = self._trainables.values()
            nn.utils.clip_grads_with_norm_(parameters, self._max_grad_norm, self._norm)
        set_learning_rate(self._optimizer, learning_rate)
        # Under fp16, GradScaler skips the step itself if a gradient is not finite.
        self._optimizer.step()
        self._drop_gradients()

    def skip_step(self) -> None:
        if scaler := self._accelerator.scaler:
            scaler.update()  # required before gradients are unscaled again
        if self._is_launched and not self._state.step:
            self._state.clear()  # AdamW has allocated it before it decided not to step
        self._drop_gradients()

    def first_nonfinite_gradient(self) -> tuple[int, str]:
        for index, (name, param) in reversed(list(enumerate(self._trainables.items()))):
            if param.grad is not None and not all_finite(local_tensor(param.grad)):
                return index, name
        return ALL_FINITE

    def local_state(self) -> dict[str, LocalShard]:
        parameters = {
            name: local_shard_of(param, local_tensor(param), param.shape)
            for name, param in self._trainables.items()
        }
        return parameters | dict(self._state.local_shards())

    @property
    def step_count(self) -> int:
        return self._state.step

    def load_optimizer(self, saved: Mapping[str, Tensor], step_count: int) -> None:
        self._state.load(saved, step_count)

    def scaler_state(self) -> dict[str, Any] | None:
        scaler = self._accelerator.scaler
        return scaler.state_dict() if scaler else None

    def load_scaler(self, state: Mapping[str, Any] | None) -> None:
        if state is not None and (scaler := self._accelerator.scaler):
            scaler.load_state_dict(dict(state))

    def _drop_gradients(self) -> None:
        self._optimizer.zero_grad()
        self._norm, self._is_launched = None, False


def _stays_on_host(param: nn.Parameter, trainables: Mapping[str, nn.Parameter]) -> bool:
    """Whether a frozen parameter is in host memory and the trained ones are not."""
    trained = {trainable.device.type for trainable in trainables.values()}
    return not param.requires_grad and param.device.type not in trained
