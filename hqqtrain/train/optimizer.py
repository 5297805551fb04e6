"""The optimizer and the learning-rate schedule that a recipe names."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from hqqtrain.config import OptimConfig, UserError


def build_optimizer(config: OptimConfig, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """AdamW over `parameters`: PyTorch's, or bitsandbytes' with 8-bit or paged state.

    Raises:
        UserError: bitsandbytes is missing, or cannot work on these parameters.
    """
    parameters = list(parameters)
    if config.name == "adamw":
        return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    if any(isinstance(p, DTensor) for p in parameters):
        raise UserError(
            f"optim.name={config.name}: bitsandbytes cannot update FSDP2's sharded parameters; "
            "use adamw, or parallel.strategy=ddp."
        )
    if config.name.startswith("paged") and not parameters[0].is_cuda:
        raise UserError(
            f"optim.name={config.name}: paged optimizers need a CUDA GPU; use adamw or adamw_8bit."
        )
    try:
        import bitsandbytes.optim as bnb
    except ImportError as error:
        raise UserError(
            f"optim.name={config.name}: needs bitsandbytes, which is not installed here ({error}); "
            "use adamw."
        ) from error
    classes = {
        "adamw_8bit": bnb.AdamW8bit,
        "paged_adamw": bnb.PagedAdamW32bit,
        "paged_adamw_8bit": bnb.PagedAdamW8bit,
    }
    return classes[config.name](parameters, lr=config.lr, weight_decay=config.weight_decay)


def build_schedule(config: OptimConfig, optimizer: Optimizer, steps: int) -> LRScheduler:
    """Linear warm-up over `warmup_steps`, then cosine or linear to zero at `steps`, or flat."""
    kind = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    return get_scheduler(
        kind, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=steps
    )
