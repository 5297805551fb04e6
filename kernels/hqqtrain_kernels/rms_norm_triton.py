"""RMSNorm with a residual connection, and its gradient: one program holds a row in registers.

The backward kernel computes the mean square of a row again, because it reads the row anyway. So
nothing but the input of the norm has to be saved.
"""

import functools
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from hqqtrain_kernels.launcher_triton import CachedKernel
from hqqtrain_kernels.norm_params import NormParams


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    sum_ptr,
    out_ptr,
    COLUMNS: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store the norm of a row, or of the sum with its residual, which is stored, too."""
    column = tl.arange(0, BLOCK)
    mask = column < COLUMNS
    at = tl.program_id(0).to(tl.int64) * COLUMNS + column
    dtype = out_ptr.dtype.element_ty
    x = tl.load(x_ptr + at, mask, 0).to(tl.float32)
    if residual_ptr is not None:
        total = (x + tl.load(residual_ptr + at, mask, 0).to(tl.float32)).to(dtype)
        tl.store(sum_ptr + at, total, mask)
        x = total.to(tl.float32)
    weight = tl.load(weight_ptr + column, mask, 0).to(tl.float32) + OFFSET
    normed = x * tl.rsqrt(tl.sum(x * x, 0) / COLUMNS + EPS)
    if ROUND_FIRST:
        normed = normed.to(dtype).to(tl.float32)
    tl.store(out_ptr + at, (normed * weight).to(dtype), mask)


@triton.jit
def _rms_norm_backward_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    grad_x_ptr,
    out_ptr,
    COLUMNS: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store the gradient of a row: r g - x r^3 mean(g x), with g = grad * weight, plus grad_x."""
    column = tl.arange(0, BLOCK)
    mask = column < COLUMNS
    at = tl.program_id(0).to(tl.int64) * COLUMNS + column
    x = tl.load(x_ptr + at, mask, 0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask, 0).to(tl.float32) + OFFSET
    g = tl.load(grad_ptr + at, mask, 0).to(tl.float32) * weight
    r = tl.rsqrt(tl.sum(x * x, 0) / COLUMNS + EPS)
    result = r * g - x * (r * r * r * (tl.sum(g * x, 0) / COLUMNS))
    if grad_x_ptr is not None:
        result += tl.load(grad_x_ptr + at, mask, 0).to(tl.float32)
    tl.store(out_ptr + at, result.to(out_ptr.dtype.element_ty), mask)


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, params: NormParams
) -> tuple[Tensor, Tensor]:
    """Return the sum, or x itself without a residual, and its norm; see `rms_norm`."""
    out = x.new_empty(x.shape)
    total = x if residual is None else x.new_empty(x.shape)
    tensors = {
        "x_ptr": x, "residual_ptr": residual, "weight_ptr": weight,
        "sum_ptr": None if residual is None else total, "out_ptr": out,
    }  # fmt: skip
    _launch("forward", tensors, x, params)
    return total, out


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, params: NormParams, grad_x: Tensor | None
) -> Tensor:
    """Return the gradient of x; see `rms_norm.rms_norm_backward`."""
    out = x.new_empty(x.shape)
    tensors = {
        "grad_ptr": grad, "x_ptr": x, "weight_ptr": weight, "grad_x_ptr": grad_x, "out_ptr": out
    }  # fmt: skip
    _launch("backward", tensors, x, params)
    return out


def _launch(name: str, tensors: dict[str, Tensor | None], x: Tensor, params: NormParams) -> None:
    assert all(tensor is None or tensor.is_contiguous() for tensor in tensors.values())
    rows, columns = x.shape
    if rows and columns:
        _cached(name, columns, params).launch((rows, 1, 1), tensors, {})


@functools.cache
def _cached(name: str, columns: int, params: NormParams) -> CachedKernel:
    block = triton.next_power_of_2(columns)
    constants: dict[str, Any] = {"COLUMNS": columns, "EPS": params.eps, "OFFSET": params.offset}
    if name == "forward":
        constants["ROUND_FIRST"] = params.casting == "llama"
    kernel = _rms_norm_kernel if name == "forward" else _rms_norm_backward_kernel
    # A thread has 16 values of a row of 4,096: two loads of 16 bytes in bf16.
    num_warps = min(16, max(1, block // 512))
    return CachedKernel(kernel, constants | {"BLOCK": block}, num_warps=num_warps)
