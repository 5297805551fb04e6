"""Activation checkpointing: a decoder layer keeps its input alone, and makes the rest again.

What it keeps can wait in the host's memory: at 80 layers of 2,048 x 8,192 in bf16 that is 2.5 GiB
of the GPU's, for 34 MB over the bus and back per layer, a hundredth of the time of its products.
"""

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from hqqtrain.models import base_model

OFFLOADED_FROM = 1 << 18
"""Numbers of a tensor that is worth the way; what is smaller stays."""


def checkpoint_layers(model: nn.Module, *, offload: bool, frees: bool = False) -> None:
    """Every decoder layer of `model` recomputes its activations in the backward pass.

    With `offload` the inputs of layers wait in pinned host memory (a no-op on a CPU). `frees`:
    parameters are empty between their uses, as ZeRO-3's; torch would take that for a difference.
    """
    base = base_model(model)
    options: dict[str, Any] = {"use_reentrant": False}
    if frees:
        options["determinism_check"] = "none"
    with warnings.catch_warnings():  # renamed in transformers 5.2x, absent before by that name
        warnings.simplefilter("ignore", FutureWarning)
        base.gradient_checkpointing_enable(options)
    if not offload:
        return
    layers = [m for m in base.modules() if hasattr(m, "_gradient_checkpointing_func")]
    assert layers, "transformers keeps the function elsewhere"
    for layer in layers:
        setattr(layer, "_gradient_checkpointing_func", partial(_offloaded, options))  # noqa: B010


def _offloaded(options: dict[str, Any], function: Any, *inputs: Any) -> Any:
    """The hooks see the inputs alone: within `function`, those of `checkpoint` are in force."""
    with saved_tensors_hooks(_to_host, _to_device):
        return checkpoint(function, *inputs, **options)


def _to_host(tensor: Tensor) -> tuple[torch.device, Tensor]:
    device = tensor.device
    if device.type != "cuda" or tensor.numel() < OFFLOADED_FROM:
        return device, tensor
    held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    held.copy_(tensor, non_blocking=True)
    return device, held


def _to_device(held: tuple[torch.device, Tensor]) -> Tensor:
    device, tensor = held
    return tensor.to(device, non_blocking=True)
