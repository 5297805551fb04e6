"""`hqqtrain::dequantize` and `hqqtrain::linear`: packed weights as torch operators.

As operators they are opaque to torch.compile and visible to autograd, whose backward here needs
the packed weight alone: it is dequantized again, and neither the dense weight nor the input is
kept. (hqq saves the input for a weight gradient that nobody takes.)
"""

from typing import Any

import torch
from torch import Tensor

from hqqtrain_kernels import product, select
from hqqtrain_kernels.layout import Layout
from hqqtrain_kernels.product import Weight

_WEIGHT = "Tensor W_q, Tensor scale, Tensor zero"
_LAYOUT = "int in_features, int nbits, int group_size, int axis"

_library = torch.library.Library("hqqtrain", "DEF")
_library.define(f"dequantize({_WEIGHT}, {_LAYOUT}, ScalarType dtype) -> Tensor")
_library.define(f"dequantize_into({_WEIGHT}, {_LAYOUT}, Tensor(a!) out) -> ()")
_library.define(f"linear(Tensor x, {_WEIGHT}, Tensor? bias, {_LAYOUT}, ScalarType dtype) -> Tensor")
_dequantize_op = torch.ops.hqqtrain.dequantize.default
_dequantize_into_op = torch.ops.hqqtrain.dequantize_into.default
_linear_op = torch.ops.hqqtrain.linear.default


def dequantize(
    W_q: Tensor, scale: Tensor, zero: Tensor, layout: Layout,
    dtype: torch.dtype | None = None, *, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """(W_q - zero) * scale: [out_features, in_features] of `dtype`, rounded once from fp32.

    W_q [units, row_bytes]: uint8, or the same bits viewed as a float. scale, zero: [units, groups].
    With `out`, of fp32, bf16 or fp16, the weight is written there: any rows of adjacent elements,
    also a part of a larger tensor.

    Raises ValueError for an `out` of another shape or with elements apart, and without either.
    """
    if out is None:
        if dtype is None:
            raise ValueError("dtype=None: say which, or give an `out` tensor")
        return _dequantize_op(W_q, scale, zero, *_numbers(layout), dtype)
    shape = (layout.out_features, layout.in_features)
    if out.shape != shape or out.stride(1) != 1 or out.dtype != (dtype or out.dtype):
        raise ValueError(
            f"out={tuple(out.shape)} {out.dtype}, strides {out.stride()}: needed is {shape} of "
            f"{dtype or out.dtype} with stride 1 along a row"
        )
    _dequantize_into_op(W_q, scale, zero, *_numbers(layout), out)
    return out


def linear(
    x: Tensor, W_q: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, layout: Layout,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """x [..., in_features] times the dequantized weight transposed, plus bias.

    The weight is dequantized to `compute_dtype` and multiplied in the dtype of x, which under
    autocast is autocast's. Few rows of x meet the packed weight directly, which up to 16 rows and
    4 bits is not rounded at all (`linear_triton.py` says how, `table.py` when). Gradients reach x
    and bias; scale and zero are frozen.
    """
    if torch._C._is_any_autocast_enabled():
        x = _autocast(x)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    weight = Weight(W_q, scale, zero, *_numbers(layout), compute_dtype)
    if not _unwatched(x):
        return _watched(x, bias, weight)
    if _needs_grad(x, scale, zero, bias):
        return _Linear.apply(x, bias, weight)
    return product.product(x, weight, bias)


def _unwatched(x: Tensor) -> bool:
    """Whether no compiler, mode, tracer, transform or subclass of x wants to see the operator.

    Then what it does is called as a function, which saves 4 us of Python, and 17 forward
    and backward (on a CPU).
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
        and not torch._C._are_functorch_transforms_active()
    )


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)


def _autocast(x: Tensor) -> Tensor:
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def _numbers(layout: Layout) -> tuple[int, int, int, int]:
    return layout.in_features, layout.nbits, layout.group_size, layout.axis


def _out_features(units: int, group_size: int, axis: int) -> int:
    return units * (1 if axis == 1 else group_size)


def _dequantize_into(
    W_q: Tensor, scale: Tensor, zero: Tensor, in_features: int, nbits: int, group_size: int,
    axis: int, out: Tensor,
) -> None:  # fmt: skip
    weight = Weight(W_q, scale, zero, in_features, nbits, group_size, axis, out.dtype)
    if select.runs_triton(W_q.device):
        product.kernels()[0].dequantize(W_q, scale, zero, weight.layout, out)
    else:
        out.copy_(product.dense(weight, out.dtype))


def _dequantize(
    W_q: Tensor, scale: Tensor, zero: Tensor, in_features: int, nbits: int, group_size: int,
    axis: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    weight = Weight(W_q, scale, zero, in_features, nbits, group_size, axis, dtype)
    return product.dense(weight, dtype)


def _linear(
    x: Tensor, W_q: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, *numbers: Any
) -> Tensor:
    return product.product(x, Weight(W_q, scale, zero, *numbers), bias)


def _watched(x: Tensor, bias: Tensor | None, weight: Weight) -> Tensor:
    W_q, scale, zero, *numbers = weight
    return _linear_op(x, W_q, scale, zero, bias, *numbers)


class _Linear(torch.autograd.Function):
    """Calls the operator below autograd: 30 us of Python less than `register_autograd`.

    The weight is one argument, of which autograd knows nothing: each tensor would cost 2 us.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: Weight) -> Tensor:
        if weight.scale.requires_grad or weight.zero.requires_grad:
            raise NotImplementedError("scale and zero are frozen: they have no gradient yet")
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(*weight[:3])
            ctx.numbers = weight[3:]
        if _unwatched(x):
            return product.product(x, weight, bias)
        with torch._C._AutoDispatchBelowAutograd():
            return _watched(x, bias, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        needs_x, needs_bias, _ = ctx.needs_input_grad
        grad_x = grad_bias = None
        if needs_x:
            grad_x = _gradient(grad, Weight(*ctx.saved_tensors, *ctx.numbers))
        if needs_bias:
            grad_bias = grad.flatten(0, -2).sum(0) if grad.dim() > 1 else grad
        return grad_x, grad_bias, None


def _gradient(grad: Tensor, weight: Weight) -> Tensor:
    if _unwatched(grad):
        return product.gradient(grad, weight)
    *packed, own = weight
    W = _dequantize_op(*packed, product.first_dtype(grad.dtype, own))
    return grad @ W.to(grad.dtype)


def _linear_autograd(
    x: Tensor, W_q: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, *numbers: Any
) -> Tensor:
    weight = Weight(W_q, scale, zero, *numbers)
    if _needs_grad(x, scale, zero, bias):
        return _Linear.apply(x, bias, weight)
    with torch._C._AutoDispatchBelowAutograd():
        return _watched(x, bias, weight)


def _dequantize_fake(
    W_q: Tensor, scale: Tensor, zero: Tensor, in_features: int, nbits: int, group_size: int,
    axis: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    out_features = _out_features(W_q.shape[0], group_size, axis)
    return scale.new_empty((out_features, in_features), dtype=dtype)


def _dequantize_into_fake(*arguments: Any) -> None:
    pass


def _linear_fake(
    x: Tensor, W_q: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, in_features: int,
    nbits: int, group_size: int, axis: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], _out_features(W_q.shape[0], group_size, axis)))


for _name, _function, _fake in (
    ("dequantize", _dequantize, _dequantize_fake),
    ("dequantize_into", _dequantize_into, _dequantize_into_fake),
    ("linear", _linear, _linear_fake),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hqqtrain::{_name}", _fake, lib=_library)
_library.impl("linear", _linear_autograd, "Autograd")
