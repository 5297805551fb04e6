"""RMSNorm with a frozen weight, and its gradient, which also take a residual connection.

A decoder layer adds the output of a module to its residual stream and norms the sum. In its
backward pass, the gradient of the norm is added to that of the stream. Each is one pass over memory
here: every value is read once and written once. All is computed in fp32.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hqqtrain_kernels import backend
from hqqtrain_kernels.norm_params import NormParams

MAX_COLUMNS = 16384
"""Columns of the largest row that a program of the kernels holds in registers."""


def rms_norm(x: Tensor, weight: Tensor, params: NormParams) -> Tensor:
    """Compute the norm of each row.

    Args:
        x: [rows, columns], fp32, bf16 or fp16. Contiguous, as all tensors here.
        weight: [columns], in the dtype of x.
        params: How to compute it.

    Returns:
        [rows, columns], in the dtype of x.
    """
    if backend.use_triton(x.device):
        return _triton_kernels().forward(x, None, weight, params)[1]
    return _norm(x, weight, params)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, params: NormParams
) -> tuple[Tensor, Tensor]:
    """Compute the sum of `x` and `residual` [rows, columns], rounded, and its norm."""
    if backend.use_triton(x.device):
        return _triton_kernels().forward(x, residual, weight, params)
    total = x + residual
    return total, _norm(total, weight, params)


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, params: NormParams, grad_x: Tensor | None = None
) -> Tensor:
    """Compute the gradient of x from the one of its norm.

    Args:
        grad: The gradient of the norm [rows, columns].
        x: The input of the norm [rows, columns].
        weight: [columns].
        params: How the norm was computed.
        grad_x: Another gradient of x [rows, columns], which is added before the result is rounded.
    """
    if backend.use_triton(x.device):
        return _triton_kernels().backward(grad, x, weight, params, grad_x)
    values, scaled = x.float(), grad.float() * (weight.float() + params.offset)
    rstd = torch.rsqrt(values.square().mean(-1, keepdim=True) + params.eps)
    slope = (scaled * values).mean(-1, keepdim=True) * rstd.pow(3)
    result = scaled * rstd - values * slope
    if grad_x is not None:
        result += grad_x
    return result.to(x.dtype)


def _norm(x: Tensor, weight: Tensor, params: NormParams) -> Tensor:
    values, factor = x.float(), weight.float() + params.offset
    normed = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + params.eps)
    if params.casting == "llama":
        normed = normed.to(x.dtype)
    return (normed * factor).to(x.dtype)


class _Kernels(NamedTuple):
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., Tensor]


@functools.cache
def _triton_kernels() -> _Kernels:
    """Import the kernels when a GPU first needs them: Triton does not exist for macOS."""
    from hqqtrain_kernels import rms_norm_triton

    return _Kernels(rms_norm_triton.forward, rms_norm_triton.backward)
