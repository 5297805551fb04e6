"""The parameters that are trained, their optimizer, and its learning rate at each step.

The optimizer steps on `trainable_parameters`, which are also what a checkpoint and `adapter/` have.
"""

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from hqqtrain.config.groups import OptimConfig
from hqqtrain.distributed.local import local_tensor
from hqqtrain.models.fqn import peft_key

logger = logging.getLogger(__name__)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of `model` that require a gradient, by PEFT's names.

    Loading makes exactly the parameters of the training method require one: today, the adapters.
    """
    named = model.named_parameters()
    return {peft_key(name): param for name, param in named if param.requires_grad}


def build_optimizer(config: OptimConfig, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """Build AdamW over `parameters`: PyTorch's, or bitsandbytes' with 8-bit or paged state."""
    options: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.name == "adamw":
        return torch.optim.AdamW(parameters, **options)
    import bitsandbytes.optim as bnb

    classes = {
        "adamw_8bit": bnb.AdamW8bit,
        "paged_adamw": bnb.PagedAdamW32bit,
        "paged_adamw_8bit": bnb.PagedAdamW8bit,
    }
    return _over_shards(list(parameters), partial(classes[config.name], **options))


def _over_shards(
    parameters: list[nn.Parameter], make: Callable[[list[nn.Parameter]], Optimizer]
) -> Optimizer:
    """Build an optimizer that does not support DTensor over this rank's shards.

    A shard shares the parameter's memory. Each step looks up that memory again, because FSDP2
    moves it after construction.
    """
    if not any(isinstance(p, DTensor) for p in parameters):
        return make(parameters)
    shards = [nn.Parameter(local_tensor(p)) for p in parameters]
    optimizer = make(shards)

    def bind_shards(*_: Any) -> None:
        for shard, full in zip(shards, parameters, strict=True):
            shard.data = local_tensor(full)
            shard.grad = (
                local_tensor(full.grad) if full.grad is not None and shard.numel() else None
            )

    def free_gradients(*_: Any) -> None:
        for tensor in (*shards, *parameters):
            tensor.grad = None

    optimizer.register_step_pre_hook(bind_shards)
    optimizer.register_step_post_hook(free_gradients)
    return optimizer


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the learning rate of all parameters for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate


@dataclass(frozen=True)
class LearningRateSchedule:
    """The schedule of `optim` over `total_steps` steps.

    The rate warms up linearly over `optim.warmup_steps`, then decays to zero at the last step by a
    cosine or linearly, or stays constant. It depends on the step only, so no state is saved.
    transformers' schedules start at a rate of 0, which wastes the first step.
    """

    optim: OptimConfig
    total_steps: int

    def __post_init__(self) -> None:
        if 0 < self.total_steps <= self.optim.warmup_steps:
            logger.warning(
                "optim.warmup_steps=%d: the run has %d steps, so it never reaches optim.lr",
                self.optim.warmup_steps, self.total_steps,
            )  # fmt: skip

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of optimizer step `step`, counted from 0."""
        optim = self.optim
        if step < optim.warmup_steps:
            return optim.lr * (step + 1) / optim.warmup_steps
        decay_steps = max(1, self.total_steps - optim.warmup_steps)
        left = max(0.0, 1 - (step - optim.warmup_steps) / decay_steps)
        if optim.schedule == "cosine":
            return optim.lr * 0.5 * (1 - math.cos(math.pi * left))
        return optim.lr * left if optim.schedule == "linear" else optim.lr
