"""`hqqtrain::dequantize` and `hqqtrain::linear`: packed weights as PyTorch operators.

A linear layer with a trainable weight needs one matrix product forward and two backward:

    forward:   y      = x      W^T    [M, N] = [M, K] [K, N]
    backward:  grad_x = grad_y W      [M, K] = [M, N] [N, K]
               grad_W = grad_y^T x    [N, K] = [N, M] [M, K]

The packed weight W = (W_q - zero) * scale is frozen, so the third product is never computed, and x
need not be saved for it. (hqq saves x for a weight gradient that nobody uses.) The backward needs
only W_q, scale and zero: it dequantizes W again, so the dense weight is not kept either.

As operators, these functions are opaque to torch.compile and visible to autograd, to fake tensors
and to tracers. Eager calls that nothing observes skip PyTorch's dispatcher, to save Python time.
"""

from typing import Any

import torch
from torch import Tensor

from hqqtrain_kernels import compat, matmul
from hqqtrain_kernels.autocast import product_dtype
from hqqtrain_kernels.layout import Layout
from hqqtrain_kernels.matmul import PackedWeight, WeightParams
from hqqtrain_kernels.op_library import (
    LIBRARY,
    dequantize_into_op,
    dequantize_op,
    linear_op,
    packed_weight,
)


def dequantize(
    W_q: Tensor,
    scale: Tensor,
    zero: Tensor,
    layout: Layout,
    dtype: torch.dtype | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Compute (W_q - zero) * scale in fp32, rounded once.

    Args:
        W_q: Packed codes [units, unit_bytes], uint8 or the same bits viewed as a float dtype.
        scale: [units, groups], of a float dtype.
        zero: [units, groups], of a float dtype.
        layout: How the weight is packed.
        dtype: Dtype of the result. May be omitted if `out` is given.
        out: An fp32, bf16 or fp16 tensor [out_features, in_features] to write to. The elements of
            a row must be adjacent. It may be part of a larger tensor.

    Returns:
        The weight [out_features, in_features]: `out` itself if it is given.

    Raises:
        ValueError: `out` has another shape or dtype or its elements are not adjacent, or neither
            `dtype` nor `out` is given.
    """
    weight = {
        "W_q": W_q,
        "scale": scale,
        "zero": zero,
        "in_features": layout.in_features,
        "nbits": layout.nbits,
        "group_size": layout.group_size,
        "axis": layout.axis,
    }
    if out is None:
        if dtype is None:
            raise ValueError("dtype=None: pass a dtype, or an `out` tensor")
        return dequantize_op(**weight, dtype=dtype)
    shape = (layout.out_features, layout.in_features)
    if out.shape != shape or out.stride(1) != 1 or out.dtype != (dtype or out.dtype):
        raise ValueError(
            f"out={tuple(out.shape)} {out.dtype}, strides {out.stride()}: needed is {shape} of "
            f"{dtype or out.dtype} with stride 1 along a row"
        )
    dequantize_into_op(**weight, out=out)
    return out


def linear(
    x: Tensor,
    W_q: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    layout: Layout,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Compute x W^T + bias with the weight W = (W_q - zero) * scale.

    The weight is dequantized to `compute_dtype` and multiplied in the dtype of x, or in autocast's
    dtype where autocast is enabled. Few rows of x are multiplied with the packed weight directly,
    which for up to 16 rows and at most 4 bits rounds no weight at all (`linear_triton.py` says how,
    `heuristics.py` when).

    Args:
        x: [..., in_features].
        W_q: Packed codes [units, unit_bytes], uint8 or the same bits viewed as a float dtype.
        scale: [units, groups]. Frozen.
        zero: [units, groups]. Frozen.
        bias: [out_features], or None.
        layout: How the weight is packed.
        compute_dtype: Dtype that the weight is rounded to; fp32 means the dtype of x.

    Returns:
        y [..., out_features], in the dtype of x or autocast's dtype. Gradients reach x and bias.

    Raises:
        NotImplementedError: scale or zero requires a gradient.
    """
    if compat.is_any_autocast_enabled():
        x = x.to(product_dtype(x))
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    params = WeightParams(
        in_features=layout.in_features,
        nbits=layout.nbits,
        group_size=layout.group_size,
        axis=layout.axis,
        compute_dtype=compute_dtype,
    )
    weight = PackedWeight(W_q=W_q, scale=scale, zero=zero, params=params)
    if not _can_skip_dispatcher(x):
        return _call_op(x, weight, bias)
    if _needs_grad(x, scale, zero, bias):
        return PackedLinearFunction.apply(x, bias, weight)
    return matmul.forward(x, weight, bias)


class PackedLinearFunction(torch.autograd.Function):
    """y = x W^T + bias with a frozen packed weight, and the gradients of x and bias.

    It calls the operator below autograd, which takes 30 us of Python less than
    `register_autograd`. The weight is one argument that autograd does not look into: each tensor
    of it would cost 2 us. That is why `forward` checks itself that scale and zero are frozen.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: PackedWeight) -> Tensor:
        """Compute y [..., N] = x [..., K] W^T + bias [N]."""
        if weight.scale.requires_grad or weight.zero.requires_grad:
            raise NotImplementedError("scale and zero are frozen: they have no gradient yet")
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(weight.W_q, weight.scale, weight.zero)
            ctx.params = weight.params
        if _can_skip_dispatcher(x):
            return matmul.forward(x, weight, bias)
        with compat.BelowAutograd():
            return _call_op(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Compute grad_x [..., K] = grad_y W and grad_bias [N], the sum of the rows of grad_y."""
        needs_x, needs_bias, _ = ctx.needs_input_grad
        grad_x = grad_bias = None
        if needs_x:
            W_q, scale, zero = ctx.saved_tensors
            weight = PackedWeight(W_q=W_q, scale=scale, zero=zero, params=ctx.params)
            grad_x = _grad_x(grad_y, weight)
        if needs_bias:
            grad_bias = grad_y.flatten(0, -2).sum(0) if grad_y.dim() > 1 else grad_y
        return grad_x, grad_bias, None


def _grad_x(grad_y: Tensor, weight: PackedWeight) -> Tensor:
    """Compute grad_y W. Tracers and double backward see the operator `dequantize`."""
    if _can_skip_dispatcher(grad_y):
        return matmul.backward_input(grad_y, weight)
    params = weight.params
    W = dequantize_op(
        W_q=weight.W_q,
        scale=weight.scale,
        zero=weight.zero,
        in_features=params.in_features,
        nbits=params.nbits,
        group_size=params.group_size,
        axis=params.axis,
        dtype=matmul.rounding_dtype(grad_y.dtype, params.compute_dtype),
    )
    return grad_y @ W.to(grad_y.dtype)


def _can_skip_dispatcher(x: Tensor) -> bool:
    """Whether no compiler, mode, tracer, transform or subclass of x needs to see the operator.

    The function behind the operator is then called directly, which saves 4 us of Python, and 17 us
    forward and backward together (on a CPU).
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and compat.dispatch_mode_count() == 0
        and compat.get_tracing_state() is None
        and not compat.are_functorch_transforms_active()
    )


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and compat.any_requires_grad(*tensors)


def _call_op(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """Call `hqqtrain::linear` through the dispatcher."""
    params = weight.params
    return linear_op(
        x=x,
        W_q=weight.W_q,
        scale=weight.scale,
        zero=weight.zero,
        bias=bias,
        in_features=params.in_features,
        nbits=params.nbits,
        group_size=params.group_size,
        axis=params.axis,
        dtype=params.compute_dtype,
    )


def _linear_autograd(
    x: Tensor, W_q: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, *params: Any
) -> Tensor:
    weight = packed_weight(W_q, scale, zero, *params)
    if _needs_grad(x, scale, zero, bias):
        return PackedLinearFunction.apply(x, bias, weight)
    with compat.BelowAutograd():
        return _call_op(x, weight, bias)


LIBRARY.impl("linear", _linear_autograd, "Autograd")
