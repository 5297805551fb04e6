"""What a strategy does around a step: gradients over ranks, their norm, the optimizer.

Torch's strategies share one way; DeepSpeed keeps gradients and optimizer to itself.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from hqqtrain.dist import training_engine
from hqqtrain.train.optimizer import build_optimizer, build_schedule
from hqqtrain.train.session import Session


class Engine(Protocol):
    """`model` is what a batch is given to. Gradients of several `backward` add up, averaged over
    ranks, until `update`."""

    model: nn.Module

    @property
    def rate(self) -> float:
        """The learning rate of the step to come."""

    def accumulating(self, *, last: bool) -> AbstractContextManager:
        """Around forward and backward of one batch, the last of a step or not."""

    def backward(self, loss: Tensor) -> None: ...

    def update(self) -> float:
        """Clips and steps; returns the gradient's norm over all ranks before. Collective."""


def build_engine(model: nn.Module, parameters: Sequence[nn.Parameter], steps: int,
                 session: Session) -> Engine:  # fmt: skip
    """For `model` as `mount` leaves it, of which `parameters` are trained in `steps` steps."""
    kind = _ZeRO3 if session.strategy == "zero3" else _Torch
    return kind(model, parameters, steps, session)


class _Torch:
    """`single`, `ddp`, `fsdp2`, and `fsdp1`, where DDP is for what is trained."""

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter], steps: int,
                 session: Session) -> None:  # fmt: skip
        self.model, self._parameters = model, parameters
        self._accelerator = session.accelerator
        self._limit = session.config.train.max_grad_norm
        if session.strategy in ("ddp", "fsdp1"):
            # Ranks begin alike, and to make sure of it would overwrite FSDP1's shards.
            self.model = DistributedDataParallel(model, init_sync=False, broadcast_buffers=False)
        optimizer = build_optimizer(session.config.optim, parameters)
        self._schedule = build_schedule(session.config.optim, optimizer, steps)
        self._optimizer = self._accelerator.prepare_optimizer(optimizer)

    @property
    def rate(self) -> float:
        return float(self._schedule.get_last_lr()[0])

    def accumulating(self, *, last: bool) -> AbstractContextManager:
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    def update(self) -> float:
        self._accelerator.unscale_gradients(self._optimizer)
        limit = math.inf if self._limit is None else self._limit
        norm = nn.utils.clip_grad_norm_(self._parameters, limit)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        return norm.item()


class _ZeRO3:
    """DeepSpeed's engine, which clips, steps and forgets gradients by itself."""

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter], steps: int,
                 session: Session) -> None:  # fmt: skip
        optimizer: Optimizer = build_optimizer(session.config.optim, parameters)
        self.model: Any = training_engine(
            model, optimizer, max_grad_norm=session.config.train.max_grad_norm,
            autocast=session.dtype,
        )  # fmt: skip
        self._schedule = build_schedule(session.config.optim, optimizer, steps)

    @property
    def rate(self) -> float:
        return float(self._schedule.get_last_lr()[0])

    def accumulating(self, *, last: bool) -> AbstractContextManager:
        self.model.set_gradient_accumulation_boundary(is_boundary=last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss)

    def update(self) -> float:
        self.model.step()
        self._schedule.step()
        norm: torch.Tensor | float = self.model.get_global_grad_norm()
        return float(norm)
