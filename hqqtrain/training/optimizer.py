"""The parameters that are trained, their optimizer, and its learning rate at each step.

The optimizer updates `trainable_parameters`; checkpoints and `adapter/` contain the same ones.
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

from hqqtrain.common.text import count
from hqqtrain.config.groups import OptimConfig
from hqqtrain.distributed.local import local_tensor, reshard
from hqqtrain.models.fqn import peft_key

logger = logging.getLogger(__name__)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of `model` that require a gradient, by PEFT's names.

    When a model is loaded, only its adapters are set to require a gradient.
    """
    reshard(model)
    named = model.named_parameters()
    return {peft_key(name): param for name, param in named if param.requires_grad}


def build_optimizer(
    config: OptimConfig, parameters: Iterable[nn.Parameter], *, fused: bool = True
) -> Optimizer:
    """Build AdamW over `parameters`: PyTorch's, or bitsandbytes' with 8-bit or paged state.

    Args:
        config: Name, learning rate and weight decay.
        parameters: The parameters, sharded or not.
        fused: Whether PyTorch's AdamW updates all parameters of a device in one call.
    """
    options: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.name == "adamw":
        return torch.optim.AdamW(parameters, fused=fused or None, **options)
    import bitsandbytes.optim as bnb

    classes = {
        "adamw_8bit": bnb.AdamW8bit,
        "paged_adamw": bnb.PagedAdamW32bit,
        "paged_adamw_8bit": bnb.PagedAdamW8bit,
    }
    return _build_over_shards(list(parameters), partial(classes[config.name], **options))


def _build_over_shards(
    parameters: list[nn.Parameter], build: Callable[[list[nn.Parameter]], Optimizer]
) -> Optimizer:
    """Build an optimizer over this rank's shards, if any parameter is sharded.

    bitsandbytes does not support DTensor, so it gets plain tensors that share the memory of the
    shards. Each step looks up this memory again, because FSDP2 moves it after construction.

    Args:
        parameters: The parameters, DTensors or plain.
        build: Builds the optimizer over plain parameters.
    """
    if not any(isinstance(param, DTensor) for param in parameters):
        return build(parameters)
    shards = [nn.Parameter(local_tensor(param)) for param in parameters]
    optimizer = build(shards)

    def bind_shards(*_: Any) -> None:
        for shard, param in zip(shards, parameters, strict=True):
            shard.data = local_tensor(param)
            # bitsandbytes cannot step on an empty shard; without a gradient, it skips the shard.
            shard.grad = None
            if param.grad is not None and shard.numel() > 0:
                shard.grad = local_tensor(param.grad)

    def free_gradients(*_: Any) -> None:
        # The `zero_grad` of the optimizer knows the shards only, not the parameters.
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

    The rate warms up linearly over `optim.warmup_steps`. Then it stays constant, or decays by a
    cosine or linearly towards zero, which it would reach one step after the last. It depends on the
    step only, so no state is saved. No step has a rate of 0, as the first step of transformers'
    schedules does, because that step would be wasted.
    """

    optim: OptimConfig
    total_steps: int

    def __post_init__(self) -> None:
        if 0 < self.total_steps <= self.optim.warmup_steps:
            logger.warning(
                "optim.warmup_steps=%d: the run has %s, so all of them warm up",
                self.optim.warmup_steps, count(self.total_steps, "step"),
            )  # fmt: skip

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of optimizer step `step`, which counts from 0."""
        optim = self.optim
        if step < optim.warmup_steps:
            return optim.lr * (step + 1) / optim.warmup_steps
        decay_steps = max(1, self.total_steps - optim.warmup_steps)
        remaining = max(0.0, 1 - (step - optim.warmup_steps) / decay_steps)  # 1, then less
        if optim.schedule == "cosine":
            return optim.lr * 0.5 * (1 - math.cos(math.pi * remaining))
        return optim.lr * remaining if optim.schedule == "linear" else optim.lr
