"""`hqqtrain::dequantize` and `hqqtrain::linear`: packed weights as torch operators.

As operators they are opaque to torch.compile and visible to autograd, whose backward here needs
the packed weight alone: it is dequantized again, and neither the dense weight nor the input is
kept. (hqq saves the input for a weight gradient that nobody takes.)
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hqqtrain_kernels import reference
from hqqtrain_kernels.layout import Layout

_WEIGHT = "Tensor W_q, Tensor scale, Tensor zero"
_LAYOUT = "int in_features, int nbits, int group_size, int axis, ScalarType dtype"

_library = torch.library.Library("hqqtrain", "DEF")
_library.define(f"dequantize({_WEIGHT}, {_LAYOUT}) -> Tensor")
_library.define(f"linear(Tensor x, {_WEIGHT}, Tensor? bias, {_LAYOUT}) -> Tensor")


def dequantize(
    W_q: Tensor, scale: Tensor, zero: Tensor, layout: Layout, dtype: torch.dtype
) -> Tensor:
    """(W_q - zero) * scale: [out_features, in_features] of `dtype`, rounded once from fp32.

    W_q [units, row_bytes]: uint8, or the same bits viewed as a float. scale, zero: [units, groups].
    """
    return torch.ops.hqqtrain.dequantize(W_q, scale, zero, *_numbers(layout), dtype)


def linear(
    x: Tensor, W_q: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, layout: Layout,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """x [..., in_features] times the dequantized weight transposed, plus bias.

    The weight is dequantized to `compute_dtype` and multiplied in the dtype of x, which under
    autocast is autocast's. Gradients reach x and bias; scale and zero must be frozen.
    """
    if _autocasts(x):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if bias is not None:
        bias = bias.to(x.dtype)
    numbers = _numbers(layout)
    return torch.ops.hqqtrain.linear(x, W_q, scale, zero, bias, *numbers, compute_dtype)


def _autocasts(x: Tensor) -> bool:
    device = x.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def _numbers(layout: Layout) -> tuple[int, int, int, int]:
    return layout.in_features, layout.nbits, layout.group_size, layout.axis


def _layout(W_q: Tensor, in_features: int, nbits: int, group_size: int, axis: int) -> Layout:
    out_features = W_q.shape[0] * (1 if axis == 1 else group_size)
    return Layout(out_features, in_features, nbits, group_size, axis)


def _dequantize(W_q: Tensor, scale: Tensor, zero: Tensor, *arguments: Any) -> Tensor:
    *numbers, dtype = arguments
    return reference.dequantize(W_q, scale, zero, _layout(W_q, *numbers), dtype)


def _dequantize_fake(W_q: Tensor, scale: Tensor, zero: Tensor, *arguments: Any) -> Tensor:
    *numbers, dtype = arguments
    layout = _layout(W_q, *numbers)
    return scale.new_empty((layout.out_features, layout.in_features), dtype=dtype)


def _weight(x: Tensor, W_q: Tensor, scale: Tensor, zero: Tensor, *arguments: Any) -> Tensor:
    """The weight in the dtype of x; fp32 is where dequantizing starts, so it needs no detour."""
    *numbers, dtype = arguments
    first = x.dtype if dtype == torch.float32 else dtype
    return torch.ops.hqqtrain.dequantize(W_q, scale, zero, *numbers, first).to(x.dtype)


def _linear(
    x: Tensor, W_q: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, *arguments: Any
) -> Tensor:
    W = _weight(x, W_q, scale, zero, *arguments)
    if not _autocasts(x):
        return F.linear(x, W, bias)
    # Autocast is still on below the operator and would change the result's dtype.
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, W, bias)


def _linear_fake(
    x: Tensor, W_q: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, *arguments: Any
) -> Tensor:
    layout = _layout(W_q, *arguments[:-1])
    return x.new_empty((*x.shape[:-1], layout.out_features))


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, W_q, scale, zero, _, *ctx.arguments = inputs
    if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
        raise NotImplementedError("scale and zero are frozen: they have no gradient yet")
    ctx.save_for_backward(W_q, scale, zero)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        W = _weight(grad, *ctx.saved_tensors, *ctx.arguments)
        grad_x = grad @ W
    if ctx.needs_input_grad[4]:
        grad_bias = grad.flatten(0, -2).sum(0) if grad.dim() > 1 else grad
    return grad_x, None, None, None, grad_bias, *(None for _ in ctx.arguments)


_library.impl("dequantize", _dequantize, "CompositeExplicitAutograd")
_library.impl("linear", _linear, "CompositeExplicitAutograd")
torch.library.register_fake("hqqtrain::dequantize", _dequantize_fake, lib=_library)
torch.library.register_fake("hqqtrain::linear", _linear_fake, lib=_library)
torch.library.register_autograd("hqqtrain::linear", _backward, setup_context=_save, lib=_library)
