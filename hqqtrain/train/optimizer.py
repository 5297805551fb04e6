"""The optimizers that a recipe can name."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from hqqtrain.config.groups import OptimConfig
from hqqtrain.distributed.local import local_tensor


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
