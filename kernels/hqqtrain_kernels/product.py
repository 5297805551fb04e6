"""A packed weight times x, and its gradient to x: fused kernels, or dequantized and multiplied.

The dense weight is a new tensor each time. torch's allocator hands the same memory out again, per
stream and also inside CUDA graphs, which a buffer of our own could not do as safely.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hqqtrain_kernels import reference, select
from hqqtrain_kernels.layout import Layout


class Weight(NamedTuple):
    """What stands for a weight [out_features, in_features]: W_q, scale, zero as `dequantize` takes
    them, then the numbers that the operators take. Without a fused kernel it is dequantized to
    `dtype`, and multiplied in the dtype of x."""

    W_q: Tensor
    scale: Tensor
    zero: Tensor
    in_features: int
    nbits: int
    group_size: int
    axis: int
    dtype: torch.dtype

    @property
    def layout(self) -> Layout:
        return _layout(self.W_q.shape[0], *self[3:7])


@functools.lru_cache(maxsize=4096)
def _layout(units: int, in_features: int, nbits: int, group_size: int, axis: int) -> Layout:
    out_features = units if axis == 1 else units * group_size
    return Layout(out_features, in_features, nbits, group_size, axis)


def product(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """x [..., in_features] times the weight transposed, plus bias, in the dtype of x."""
    if select.runs_triton(x.device):
        fused = kernels()[1].linear(x, *weight[:3], bias, weight.layout)
        if fused is not None:
            return fused
    if x.is_meta or not torch._C._is_any_autocast_enabled():
        return F.linear(x, _dense_like(x, weight), bias)
    # Autocast is still on below the operator and would change the result's dtype.
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, _dense_like(x, weight), bias)


def gradient(grad: Tensor, weight: Weight) -> Tensor:
    """What reaches x: grad [..., out_features] times the weight, in the dtype of grad."""
    return grad @ _dense_like(grad, weight)


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """(W_q - zero) * scale [out_features, in_features], rounded once."""
    W_q, scale, zero = weight[:3]
    layout = weight.layout
    if not select.runs_triton(W_q.device):
        return reference.dequantize(W_q, scale, zero, layout, dtype)
    shape = (layout.out_features, layout.in_features)
    if dtype.itemsize > 4:  # than the kernel writes
        return dense(weight, torch.float32).to(dtype)
    out = scale.new_empty(shape, dtype=dtype)
    kernels()[0].dequantize(W_q, scale, zero, layout, out)
    return out


@functools.cache
def kernels() -> tuple[Any, Any]:
    """Those of Triton, imported when a GPU first needs them: triton is absent on a Mac."""
    from hqqtrain_kernels import dequantize_triton, linear_triton

    return dequantize_triton, linear_triton


def first_dtype(wanted: torch.dtype, own: torch.dtype) -> torch.dtype:
    """What to round to before `wanted`: a weight's own dtype, unless that is fp32, where
    dequantizing starts."""
    return wanted if own == torch.float32 else own


def _dense_like(x: Tensor, weight: Weight) -> Tensor:
    W = dense(weight, first_dtype(x.dtype, weight.dtype))
    return W if W.dtype == x.dtype else W.to(x.dtype)
