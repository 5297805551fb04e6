"""The activation of a gated linear unit and its gradients, each in one pass over memory.

Both activations are gate * sigmoid(p(gate)): SiLU with p(x) = x, and the tanh approximation of GELU
with p(x) = 2 c (x + 0.044715 x^3) and c = sqrt(2 / pi), because (1 + tanh(y)) / 2 = sigmoid(2 y).
"""

import functools
from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from hqqtrain_kernels.launcher_triton import CachedKernel

BLOCK = 1024
"""Features of a program: 8 of each thread of 4 warps, which in bf16 are one load of 16 bytes."""


@triton.jit
def _sigmoid_and_slope(gate, GELU: tl.constexpr):
    """Return s = sigmoid(p(gate)) and the derivative of gate * s."""
    p, slope = gate, 1.0
    if GELU:
        p = 1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate)
        slope = 1.5957691216057308 * (1.0 + 3 * 0.044715 * gate * gate)
    s = 1.0 / (1.0 + tl.exp(-p))
    return s, s * (1.0 + gate * (1.0 - s) * slope)


@triton.jit
def _gated_activation_kernel(
    gate_up_ptr, h_ptr, FEATURES: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr
):
    """Store act(gate) * up: one program computes BLOCK features of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < FEATURES
    gate_ptr = gate_up_ptr + row * 2 * FEATURES + column
    gate = tl.load(gate_ptr, mask, 0).to(tl.float32)
    up = tl.load(gate_ptr + FEATURES, mask, 0).to(tl.float32)
    s, _ = _sigmoid_and_slope(gate, GELU)
    tl.store(h_ptr + row * FEATURES + column, (gate * s * up).to(h_ptr.dtype.element_ty), mask)


@triton.jit
def _gated_activation_backward_kernel(
    grad_h_ptr,
    gate_up_ptr,
    out_ptr,
    FEATURES: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Overwrite grad_h with h, and store the gradients of gate and up, perhaps in their place."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < FEATURES
    h_ptr, gate_at = grad_h_ptr + row * FEATURES + column, row * 2 * FEATURES + column
    gate = tl.load(gate_up_ptr + gate_at, mask, 0).to(tl.float32)
    up = tl.load(gate_up_ptr + gate_at + FEATURES, mask, 0).to(tl.float32)
    grad = tl.load(h_ptr, mask, 0).to(tl.float32)
    s, derivative = _sigmoid_and_slope(gate, GELU)
    activated = gate * s
    dtype = out_ptr.dtype.element_ty
    tl.store(h_ptr, (activated * up).to(dtype), mask)
    tl.store(out_ptr + gate_at, (grad * up * derivative).to(dtype), mask)
    tl.store(out_ptr + gate_at + FEATURES, (grad * activated).to(dtype), mask)


def gated_activation(gate_up: Tensor, activation: str) -> Tensor:
    """Compute act(gate) * up [rows, features]; see `glu.gated_activation`."""
    rows, features = gate_up.shape[0], gate_up.shape[1] // 2
    h = gate_up.new_empty(rows, features)
    assert gate_up.is_contiguous()
    _launch(
        _gated_activation_kernel, rows, features, activation, {"gate_up_ptr": gate_up, "h_ptr": h}
    )
    return h


def gated_activation_backward(
    grad_h: Tensor, gate_up: Tensor, activation: str, out: Tensor
) -> None:
    """Overwrite `grad_h` and write `out`; see `glu.gated_activation_backward`."""
    assert all(tensor.is_contiguous() for tensor in (grad_h, gate_up, out))
    rows, features = grad_h.shape
    tensors = {"grad_h_ptr": grad_h, "gate_up_ptr": gate_up, "out_ptr": out}
    _launch(_gated_activation_backward_kernel, rows, features, activation, tensors)


def _launch(
    kernel: Any, rows: int, features: int, activation: str, tensors: Mapping[str, Tensor]
) -> None:
    if rows and features:
        grid = (rows, triton.cdiv(features, BLOCK), 1)
        _cached(kernel, features, activation).launch(grid, dict(tensors), {})


@functools.cache
def _cached(kernel: Any, features: int, activation: str) -> CachedKernel:
    constants = {"FEATURES": features, "GELU": activation == "gelu_tanh", "BLOCK": BLOCK}
    return CachedKernel(kernel, constants, num_warps=4)
