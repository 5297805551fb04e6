"""Keep frozen weights in host memory and copy them to the GPU while earlier layers compute.

`offload_meta` does so for the scale and zero of quantized linears, also in training: a 2-bit model
with groups of 64 and 16-bit scale and zero is a fifth smaller on the GPU. `offload_modules` does so
for all parameters of modules that are only run forward, such as decoder layers.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain.nn.staging import StagedTensors

META = ("scale", "zero")
"""The parameters of an `HQQLinear` that `offload_meta` keeps in host memory."""


def offload_meta(groups: Iterable[Sequence[HQQLinear]]) -> None:
    """Move the scale and zero of linears to host memory. The layers compute the same bits.

    The parameters stay where they are found, saved and checked, but are on the host, whatever
    device the layer is moved to. They must not change afterwards.

    Args:
        groups: The linears in the order of their use; those of a group are copied together.
    """
    staged = StagedTensors()
    for linears in groups:
        meta = [linear.get_parameter(name) for linear in linears for name in META]
        index, hosts = staged.add(meta)
        for number, linear in enumerate(linears):
            own = slice(number * len(META), (number + 1) * len(META))
            for name, host in zip(META, hosts[own], strict=True):
                linear.get_parameter(name).data = host
            linear.fetch_meta = partial(_fetch_part, staged, index, own)


def _fetch_part(
    staged: StagedTensors, index: int, part: slice, device: torch.device
) -> list[Tensor]:
    """Return some tensors of a group on `device`."""
    return staged.fetch(index, device)[part]


def offload_modules(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Let the parameters of modules that are in host memory be on `device` during each call.

    The modules can only be called without gradients.

    Args:
        modules: The modules in the order of their calls, such as decoder layers.
        device: The device that they compute on. Other parameters must be there already.
    """
    staged = StagedTensors()
    for module in modules:
        params = [param for param in module.parameters() if param.device.type == "cpu"]
        if not params:
            continue
        index, hosts = staged.add([param.data for param in params])
        _place(params, hosts)

        def enter(*_: Any, params: list = params, index: int = index) -> None:
            if torch.is_grad_enabled():
                raise RuntimeError("weights in host memory have no gradients; use torch.no_grad()")
            _place(params, staged.fetch(index, device))

        module.register_forward_pre_hook(enter)
        leave = partial(_leave, params, hosts)
        module.register_forward_hook(leave, always_call=True)


def _leave(params: list[nn.Parameter], hosts: list[Tensor], *_: Any) -> None:
    _place(params, hosts)


def _place(params: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    """Let parameters have other memory of the same shape and dtype, on any device."""
    for param, value in zip(params, values, strict=True):
        param.data = value
