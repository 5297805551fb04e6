"""The engine of PyTorch's strategies: `single`, `ddp`, `fsdp2` and `fsdp1`.

Under `fsdp1`, DDP averages the gradients of the trained parameters, which FSDP1 does not shard.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hqqtrain.distributed.gather import LocalShard, local_shard_of
from hqqtrain.distributed.local import local_tensor
from hqqtrain.distributed.runtime import Runtime
from hqqtrain.train.engine import ALL_FINITE, Accepts, all_finite
from hqqtrain.train.optimizer import build_optimizer, set_learning_rate
from hqqtrain.train.optimizer_state import OptimizerState


class TorchEngine:
    """Implements `Engine` with PyTorch and accelerate."""

    def __init__(self, model: nn.Module, trained: Mapping[str, nn.Parameter],
                 runtime: Runtime) -> None:  # fmt: skip
        self.model, self._trained = model, trained
        self._accelerator = runtime.accelerator
        self._limit = runtime.config.train.max_grad_norm
        if runtime.strategy in ("ddp", "fsdp1"):
            # All ranks start with equal weights. DDP's initial broadcast would overwrite the
            # shards of FSDP1, so it is off.
            self.model = DistributedDataParallel(model, init_sync=False, broadcast_buffers=False)
        optimizer = build_optimizer(runtime.config.optim, trained.values())
        self._state = OptimizerState(optimizer, trained)
        self._optimizer = self._accelerator.prepare_optimizer(optimizer)

    def accumulation_context(self, *, last: bool) -> AbstractContextManager:
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    def update(self, rate: float, accepts: Accepts) -> None:
        self._accelerator.unscale_gradients(self._optimizer)
        parameters = self._trained.values()
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
        accepted = accepts(whole.item())
        if accepted and self._limit is not None:
            nn.utils.clip_grads_with_norm_(parameters, self._limit, norm)
        if accepted:  # under fp16, GradScaler skips the step itself if a gradient is not finite
            set_learning_rate(self._optimizer, rate)
            self._optimizer.step()
        elif scaler := self._accelerator.scaler:
            scaler.update()
        self._optimizer.zero_grad()

    def not_finite(self) -> tuple[int, str]:
        grads = ((number, name, p.grad) for number, (name, p) in enumerate(self._trained.items()))
        bad = [
            (n, name) for n, name, g in grads if g is not None and not all_finite(local_tensor(g))
        ]
        return max(bad, default=ALL_FINITE)

    def pieces(self) -> dict[str, LocalShard]:
        own = {
            name: local_shard_of(p, local_tensor(p), p.shape) for name, p in self._trained.items()
        }
        return own | dict(self._state.pieces())

    @property
    def updates(self) -> int:
        return self._state.step

    def load_optimizer(self, saved: Mapping[str, Tensor], updates: int) -> None:
        self._state.load(saved, updates)
