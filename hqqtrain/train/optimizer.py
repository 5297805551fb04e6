"""The optimizer and the learning-rate schedule that a recipe names."""

import importlib.util
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from hqqtrain.config import OptimConfig, UserError
from hqqtrain.dist import local


def check_optimizer(
    config: OptimConfig, strategy: str, precision: str, device: torch.device
) -> None:
    """Raises UserError where `optim.name` cannot work here: before anything is read or written."""
    if config.name == "adamw":
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"optim.name={config.name}: needs bitsandbytes, which is not installed; use adamw."
        )
    if strategy == "zero3":
        raise UserError(
            f"optim.name={config.name}: DeepSpeed keeps fp32 copies of what is trained, and flat "
            "states, which cannot be saved by name; under parallel.strategy=zero3 use adamw."
        )
    if strategy == "fsdp2" and precision == "fp16":
        raise UserError(
            f"optim.name={config.name}: cannot follow the scaling of gradients that "
            "train.precision=fp16 needs, under parallel.strategy=fsdp2; use bf16, or adamw."
        )
    if config.name.startswith("paged") and device.type != "cuda":
        raise UserError(
            f"optim.name={config.name}: paged optimizers need a CUDA GPU; use adamw or adamw_8bit."
        )


def build_optimizer(config: OptimConfig, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """AdamW over `parameters`: PyTorch's, or bitsandbytes' with 8-bit or paged state."""
    options: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.name == "adamw":
        return torch.optim.AdamW(parameters, **options)
    import bitsandbytes.optim as bnb

    classes = {
        "adamw_8bit": bnb.AdamW8bit,
        "paged_adamw": bnb.PagedAdamW32bit,
        "paged_adamw_8bit": bnb.PagedAdamW8bit,
    }
    return _over_parts(list(parameters), partial(classes[config.name], **options))


def _over_parts(
    parameters: list[nn.Parameter], make: Callable[[list[nn.Parameter]], Optimizer]
) -> Optimizer:
    """An optimizer that knows plain tensors alone gets this rank's part of each sharded one.

    A part shares the parameter's memory, found anew for each step: FSDP2 moves it once.
    """
    if not any(isinstance(p, DTensor) for p in parameters):
        return make(parameters)
    parts = [nn.Parameter(local(p)) for p in parameters]
    optimizer = make(parts)

    def lend(*_: Any) -> None:
        for part, whole in zip(parts, parameters, strict=True):
            part.data = local(whole)
            part.grad = local(whole.grad) if whole.grad is not None and part.numel() else None

    def take_back(*_: Any) -> None:
        for tensor in (*parts, *parameters):
            tensor.grad = None

    optimizer.register_step_pre_hook(lend)
    optimizer.register_step_post_hook(take_back)
    return optimizer


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Of optimizer step `step`, counted from 0, of `steps`.

    Linear warm-up over `warmup_steps`, then cosine or linear to zero at `steps`, or flat. Not
    transformers' schedules: theirs begin at a rate of 0, which wastes the first step. A function
    of the step alone, so that there is nothing to save.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    left = 1 - (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 - math.cos(math.pi * max(0.0, left)))
    return config.lr * max(0.0, left) if config.schedule == "linear" else config.lr


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """`rate` is the next step's, of all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = rate
