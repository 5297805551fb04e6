"""What a strategy does around a step: gradients over ranks, their norm, the optimizer.

Torch's strategies share one way; DeepSpeed keeps gradients and optimizer to itself.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from hqqtrain.dist import Piece, local, piece_of, training_engine, zero3
from hqqtrain.train.optimizer import build_optimizer
from hqqtrain.train.optimizer_state import OptimizerState
from hqqtrain.train.session import Session

Accepts = Callable[[float], bool]

_NONE = (-1, "")


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


def build_engine(model: nn.Module, trained: Mapping[str, nn.Parameter],
                 session: Session) -> Engine:  # fmt: skip
    """For `model` as `mount` leaves it, of which `trained`, by PEFT's names, are trained."""
    kind = _ZeRO3 if session.strategy == "zero3" else _Torch
    return kind(model, trained, session)


class _Torch:
    """`single`, `ddp`, `fsdp2`, and `fsdp1`, where DDP is for what is trained."""

    def __init__(self, model: nn.Module, trained: Mapping[str, nn.Parameter],
                 session: Session) -> None:  # fmt: skip
        self.model, self._trained = model, trained
        self._accelerator = session.accelerator
        self._limit = session.config.train.max_grad_norm
        if session.strategy in ("ddp", "fsdp1"):
            # Ranks begin alike, and to make sure of it would overwrite FSDP1's shards.
            self.model = DistributedDataParallel(model, init_sync=False, broadcast_buffers=False)
        optimizer = build_optimizer(session.config.optim, trained.values())
        self._state = OptimizerState(optimizer, trained)
        self._optimizer = self._accelerator.prepare_optimizer(optimizer)

    def accumulating(self, *, last: bool) -> AbstractContextManager:
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
        if accepted:  # a scaler skips what is not finite by itself
            _set_rate(self._optimizer, rate)
            self._optimizer.step()
        elif scaler := self._accelerator.scaler:
            scaler.update()
        self._optimizer.zero_grad()

    def not_finite(self) -> tuple[int, str]:
        grads = ((number, name, p.grad) for number, (name, p) in enumerate(self._trained.items()))
        bad = [(n, name) for n, name, g in grads if g is not None and not _is_finite(local(g))]
        return max(bad, default=_NONE)

    def pieces(self) -> dict[str, Piece]:
        own = {name: piece_of(p, local(p), p.shape) for name, p in self._trained.items()}
        return own | dict(self._state.pieces())

    @property
    def updates(self) -> int:
        return self._state.step

    def load_optimizer(self, saved: Mapping[str, Tensor], updates: int) -> None:
        self._state.load(saved, updates)


class _ZeRO3:
    """DeepSpeed's engine, which clips, steps and forgets gradients by itself."""

    def __init__(self, model: nn.Module, trained: Mapping[str, nn.Parameter],
                 session: Session) -> None:  # fmt: skip
        self._trained = trained
        self._optimizer = build_optimizer(session.config.optim, trained.values())
        self.model: Any = training_engine(
            model, self._optimizer, max_grad_norm=session.config.train.max_grad_norm,
            autocast=session.dtype,
        )  # fmt: skip
        # Gradients are DeepSpeed's own once they are made.
        self._is_bad = torch.zeros(len(trained), dtype=torch.bool, device=session.device)
        for number, param in enumerate(trained.values()):
            param.register_hook(partial(self._look, number))

    def _look(self, number: int, grad: Tensor) -> None:
        """No value is waited for."""
        self._is_bad[number] |= ~_is_finite(grad)

    def accumulating(self, *, last: bool) -> AbstractContextManager:
        self.model.set_gradient_accumulation_boundary(is_boundary=last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss)

    def update(self, rate: float, accepts: Accepts) -> None:
        """It has stepped before it tells the norm, so a refusal must end the run."""
        _set_rate(self._optimizer, rate)
        self.model.step()
        norm: torch.Tensor | float = self.model.get_global_grad_norm()
        accepts(float(norm))
        self._is_bad.zero_()

    def not_finite(self) -> tuple[int, str]:
        flags = zip(enumerate(self._trained), self._is_bad.tolist(), strict=True)
        return max((named for named, bad in flags if bad), default=_NONE)

    def pieces(self) -> dict[str, Piece]:
        made = {}
        for name, param in self._trained.items():
            for key, part in zero3.trained_parts(self.model, param).items():
                shape = param.ds_shape  # type: ignore[attr-defined]
                made[f"{name}/{key}" if key else name] = piece_of(param, part, shape)
        return made

    @property
    def updates(self) -> int:
        return zero3.steps_taken(self.model)

    def load_optimizer(self, saved: Mapping[str, Tensor], updates: int) -> None:
        moments: dict[Tensor, dict[str, Tensor]] = {
            param: {key: saved[f"{name}/{key}"] for key in zero3.MOMENTS}
            for name, param in self._trained.items() if updates
        }  # fmt: skip
        if updates:
            zero3.load_moments(self.model, updates, moments)


def _is_finite(grad: Tensor) -> Tensor:
    return grad.isfinite().all()


def _set_rate(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
