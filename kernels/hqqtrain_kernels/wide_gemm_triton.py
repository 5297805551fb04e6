"""The linear kernel for 17 to 128 rows of x, and for 8 bits: weights are dequantized on the fly.

Program (i, j) computes y^T [BLOCK_N, BLOCK_M] for one block of outputs and one block of rows of x,
and walks along K. It rounds a weight to the dtype of x, as `dequantize` does, and multiplies it
like any dense weight. With this many rows of x, rounding every weight costs less than scaling the
sums of every group.

The weight is the first operand, y^T = W x^T, because only the first operand of the tensor cores may
come from registers. With K_SLICES = 1, the warps of a program are arranged along its rows of the
weight. Otherwise they are distributed over K_SLICES slices of K, each of which takes another
stretch of all the rows, and the sums of the slices are added at the end. Slices keep the warps busy
if there are few outputs.
"""

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqqtrain_kernels.heuristics import WideGemmConfig
from hqqtrain_kernels.launcher_triton import (
    INTERPRETED,
    MAX_REGISTERS,
    TRITON_DTYPES,
    CachedKernel,
)
from hqqtrain_kernels.layout import Layout
from hqqtrain_kernels.loads_triton import dot, load_scales, load_words, load_x
from hqqtrain_kernels.pdl_triton import supports_pdl, wait_for_kernel_ahead
from hqqtrain_kernels.unpack_triton import codes_to_fp32, take


def wide_gemm(
    x: Tensor,
    W_q: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    layout: Layout,
    config: WideGemmConfig,
) -> Tensor:
    """Compute y [M, N] from x [M, K], whose rows have adjacent elements."""
    (M, K), N = x.shape, layout.out_features
    stride = x.stride(0)
    stride_divisor = 8 if stride % 8 == 0 else 1
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    kernel = _kernel_for(layout, config, x.dtype, stride_divisor, supports_pdl(x.device))
    kernel.launch(
        grid=(-(-N // config.block_n), -(-M // config.block_m), 1),
        tensors={
            "x_ptr": x,
            "W_q_ptr": W_q,
            "scale_ptr": scale,
            "zero_ptr": zero,
            "bias_ptr": bias,
            "y_ptr": y,
        },
        integers={"M": M, "N": N, "K": K, "x_stride": stride // stride_divisor},
    )
    return y


@functools.lru_cache(maxsize=4096)
def _kernel_for(
    layout: Layout, config: WideGemmConfig, dtype: torch.dtype, stride_divisor: int, pdl: bool
) -> CachedKernel:
    """Return the kernel for a layout; layouts with equal constants share it."""
    k_per_step = config.block_k * config.k_slices
    return _cached_kernel(
        num_warps=config.num_warps,
        NBITS=layout.nbits,
        GROUP_SIZE=layout.group_size,
        X_STRIDE_DIVISOR=stride_divisor,
        GROUPS_DIVISOR=math.gcd(layout.groups, 8),
        BLOCK_N=config.block_n,
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        K_SLICES=config.k_slices,
        GROUP_K=min(layout.group_size, config.block_k),
        DOT_K=min(layout.group_size, 64),
        EVEN_K=layout.in_features % k_per_step == 0,
        DTYPE=TRITON_DTYPES[dtype],
        UPCAST=INTERPRETED,
        NUM_STAGES=config.num_stages,
        PDL=pdl,
    )


@functools.lru_cache(maxsize=4096)
def _cached_kernel(num_warps: int, **constants: Any) -> CachedKernel:
    return CachedKernel(
        _wide_gemm_kernel,
        constants,
        num_warps=num_warps,
        num_stages=constants["NUM_STAGES"],
        maxnreg=MAX_REGISTERS,
    )


@triton.jit(do_not_specialize=["M", "N", "K", "x_stride"])
def _wide_gemm_kernel(
    x_ptr,
    W_q_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    x_stride,
    NBITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    X_STRIDE_DIVISOR: tl.constexpr,
    GROUPS_DIVISOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    K_SLICES: tl.constexpr,
    GROUP_K: tl.constexpr,
    DOT_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    DTYPE: tl.constexpr,
    UPCAST: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Compute one block of y.

    GROUP_K adjacent codes of a slice share a scale, and one `tl.dot` takes DOT_K of them.
    `skinny_gemm_triton` explains the divisors.
    """
    wait_for_kernel_ahead(PDL)
    DOTS_PER_GROUP: tl.constexpr = GROUP_K // DOT_K
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    # Rows of the weight past the end read its last row. Their results are not stored.
    row = tl.minimum(n, N - 1).to(tl.int64)
    # A row of W_q: words of the low plane (for 3 bits the 2-bit plane), then of the high plane.
    low_words = tl.cdiv(K * (2 if NBITS == 3 else NBITS), 128) * 4
    high_words = tl.cdiv(K, 128) * 4 if NBITS == 3 else 0
    W_q_ptr = W_q_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + row * (low_words + high_words)
    groups = K // GROUP_SIZE // GROUPS_DIVISOR * GROUPS_DIVISOR
    scale_ptr += row * groups
    zero_ptr += row * groups
    x_stride *= X_STRIDE_DIVISOR
    acc = _zeros(BLOCK_N=BLOCK_N, BLOCK_M=BLOCK_M, K_SLICES=K_SLICES)
    for step in tl.range(0, tl.cdiv(K, K_SLICES * BLOCK_K), num_stages=NUM_STAGES):
        # 1. Load and unpack this step's codes as fp32, [K_SLICES * BLOCK_N, BLOCK_K].
        if NBITS == 3:
            low = load_words(
                row_ptrs=W_q_ptr,
                step=step,
                end=low_words,
                WIDTH=2,
                BLOCK_K=BLOCK_K,
                K_SLICES=K_SLICES,
                EVEN_K=EVEN_K,
            )
            W = codes_to_fp32(low, 2)
            high_ptr = W_q_ptr + low_words
            high = load_words(
                row_ptrs=high_ptr,
                step=step,
                end=high_words,
                WIDTH=1,
                BLOCK_K=BLOCK_K,
                K_SLICES=K_SLICES,
                EVEN_K=EVEN_K,
            )
            W += 4.0 * codes_to_fp32(high, 1)
        else:
            words = load_words(
                row_ptrs=W_q_ptr,
                step=step,
                end=low_words,
                WIDTH=NBITS,
                BLOCK_K=BLOCK_K,
                K_SLICES=K_SLICES,
                EVEN_K=EVEN_K,
            )
            W = codes_to_fp32(words, NBITS)
        W = tl.reshape(W, (K_SLICES * BLOCK_N, BLOCK_K // DOT_K, DOT_K))
        # 2. Load the scales and zeros of this step's groups.
        scale = load_scales(
            row_ptrs=scale_ptr,
            step=step,
            groups=groups,
            GROUP_SIZE=GROUP_SIZE,
            BLOCK_K=BLOCK_K,
            K_SLICES=K_SLICES,
            EVEN_K=EVEN_K,
        )
        zero = load_scales(
            row_ptrs=zero_ptr,
            step=step,
            groups=groups,
            GROUP_SIZE=GROUP_SIZE,
            BLOCK_K=BLOCK_K,
            K_SLICES=K_SLICES,
            EVEN_K=EVEN_K,
        )
        # 3. For each `tl.dot`, dequantize in fp32, round to the dtype of x, and multiply.
        for j in tl.static_range(BLOCK_K // DOT_K):
            dot_W = _split_slices(take(W, j), K_SLICES)
            dot_W -= _split_slices(take(zero, j // DOTS_PER_GROUP), K_SLICES).to(tl.float32)
            dot_W *= _split_slices(take(scale, j // DOTS_PER_GROUP), K_SLICES).to(tl.float32)
            dot_x = load_x(
                x_ptr=x_ptr,
                x_stride=x_stride,
                m=m,
                M=M,
                K=K,
                step=step,
                dot_index=j,
                DOT_K=DOT_K,
                BLOCK_K=BLOCK_K,
                K_SLICES=K_SLICES,
                EVEN_K=EVEN_K,
            )
            acc = dot(dot_W.to(DTYPE), dot_x, acc=acc, UPCAST=UPCAST)
    _store(
        y_ptr=y_ptr, bias_ptr=bias_ptr, acc=acc, n=n, N=N, m=m, M=M, K_SLICES=K_SLICES, DTYPE=DTYPE
    )


@triton.jit
def _store(y_ptr, bias_ptr, acc, n, N, m, M, K_SLICES: tl.constexpr, DTYPE: tl.constexpr):
    """Sum acc over the slices, add the bias, and store the transposed block in y [M, N]."""
    if K_SLICES > 1:
        acc = tl.sum(acc, 0)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    mask = (n < N)[:, None] & (m < M)[None, :]
    tl.store(y_ptr + m.to(tl.int64)[None, :] * N + n[:, None], acc.to(DTYPE), mask=mask)


@triton.jit
def _zeros(BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, K_SLICES: tl.constexpr):
    """Return fp32 zeros: [K_SLICES, BLOCK_N, BLOCK_M], or 2-D for a single slice."""
    if K_SLICES > 1:
        zeros = tl.zeros((K_SLICES, BLOCK_N, BLOCK_M), tl.float32)
    else:
        zeros = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    return zeros


@triton.jit
def _split_slices(t, K_SLICES: tl.constexpr):
    """Reshape [K_SLICES * rows, columns] to [K_SLICES, rows, columns].

    A single slice stays 2-D, as wgmma needs it.
    """
    if K_SLICES > 1:
        t = tl.reshape(t, (K_SLICES, t.shape[0] // K_SLICES, t.shape[1]))
    return t
