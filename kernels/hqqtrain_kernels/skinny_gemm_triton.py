"""The linear kernel for up to 16 rows of x ("skinny" GEMM): x stays put, the weight streams past.

Program (split, j) keeps one split of K of all rows of x in registers. It multiplies x with the same
split of many rows of the weight, BLOCK_N rows in each step of its loop, and writes the partial
sums. `reduce_split_k` adds the splits. The alternative would be a program that walks along all of
K for its own rows of the weight. It would read x again for these rows: at 16 rows of x, more bytes
than the weight has. A split consists of K_SLICES slices of BLOCK_K elements, one for each warp.

The weight is the first operand, y^T = W x^T, because its codes then come straight from the
registers that unpacked them. Codes are multiplied as integers, which bf16 and fp16 represent
exactly, and scale and zero are applied to the fp32 sum of a group:

    y[n] = sum over groups g of scale[n, g] * (sum_k code[n, k] x[k] - zero[n, g] * sum_k x[k])

where k runs over the elements of group g. The tensor cores get codes in the order in which
unpacking leaves them in the registers, so x is brought into that order, once per program.
"""

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqqtrain_kernels.heuristics import SkinnyGemmConfig
from hqqtrain_kernels.launcher_triton import (
    INTERPRETED,
    MAX_REGISTERS,
    TRITON_DTYPES,
    CachedKernel,
)
from hqqtrain_kernels.layout import Layout
from hqqtrain_kernels.loads_triton import dot, load_scales
from hqqtrain_kernels.pdl_triton import supports_pdl, wait_for_kernel_ahead
from hqqtrain_kernels.skinny_operands_triton import load_codes, load_operands, sum_slices
from hqqtrain_kernels.split_k_triton import programs_per_split, reduce_split_k
from hqqtrain_kernels.unpack_triton import ADJACENT_PAIRS, operand_format, take


def skinny_gemm(
    x: Tensor,
    W_q: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    layout: Layout,
    config: SkinnyGemmConfig,
) -> Tensor:
    """Compute y [M, N] from x [M, K], whose rows have adjacent elements; M <= config.block_m."""
    (M, K), N = x.shape, layout.out_features
    num_splits = -(-K // (config.block_k * config.k_slices))
    steps = -(-N // config.block_n)
    programs = programs_per_split(x.device, config.programs_per_sm, num_splits, steps)
    partial = torch.empty((num_splits, N, config.block_m), dtype=torch.float32, device=x.device)
    stride = x.stride(0)
    stride_divisor = 8 if stride % 8 == 0 else 1
    kernel = _kernel_for(layout, config, x.dtype, stride_divisor, supports_pdl(x.device))
    kernel.launch(
        grid=(num_splits, programs, 1),
        tensors={
            "x_ptr": x,
            "W_q_ptr": W_q,
            "scale_ptr": scale,
            "zero_ptr": zero,
            "partial_ptr": partial,
        },
        integers={
            "M": M,
            "N": N,
            "K": K,
            "x_stride": stride // stride_divisor,
        },
    )
    return reduce_split_k(partial=partial, bias=bias, x=x)


@functools.lru_cache(maxsize=4096)
def _kernel_for(
    layout: Layout, config: SkinnyGemmConfig, dtype: torch.dtype, stride_divisor: int, pdl: bool
) -> CachedKernel:
    """Return the kernel for a layout; layouts with equal constants share it."""
    k_per_step = config.block_k * config.k_slices
    return _cached_kernel(
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
        **operand_format(dtype, layout.nbits),
        ADJACENT_PAIRS=ADJACENT_PAIRS,
        EVEN_K=layout.in_features % k_per_step == 0,
        DTYPE=TRITON_DTYPES[dtype],
        UPCAST=INTERPRETED,
        NUM_STAGES=config.num_stages,
        PDL=pdl,
    )


@functools.lru_cache(maxsize=4096)
def _cached_kernel(**constants: Any) -> CachedKernel:
    return CachedKernel(
        _skinny_gemm_kernel,
        constants,
        num_warps=constants["K_SLICES"],
        num_stages=constants["NUM_STAGES"],
        maxnreg=MAX_REGISTERS,
    )


@triton.jit(do_not_specialize=["M", "N", "K", "x_stride"])
def _skinny_gemm_kernel(
    x_ptr,
    W_q_ptr,
    scale_ptr,
    zero_ptr,
    partial_ptr,
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
    FIELDS_PER_SHIFT: tl.constexpr,
    CODE_OFFSET: tl.constexpr,
    CODE_STEP: tl.constexpr,
    ADJACENT_PAIRS: tl.constexpr,
    EVEN_K: tl.constexpr,
    DTYPE: tl.constexpr,
    UPCAST: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Write partial_ptr [num_splits, N, BLOCK_M]: the products over one split of K.

    GROUP_K adjacent codes of a slice share a scale, and one `tl.dot` takes DOT_K of them.
    `operand_format` explains FIELDS_PER_SHIFT, CODE_OFFSET and CODE_STEP.

    Integers are not specialized, so the compiler does not know their divisors. x_stride is
    therefore passed as a quotient and multiplied by the constant X_STRIDE_DIVISOR here, and the
    number of groups is divided and multiplied by GROUPS_DIVISOR, which divides it. This way the
    compiler sees how pointers are aligned.

    If BLOCK_N does not divide N, the last step begins BLOCK_N rows before the end. It computes some
    rows a second time, with equal bits, and no step needs a mask.
    """
    DOTS_PER_GROUP: tl.constexpr = GROUP_K // DOT_K
    split = tl.program_id(0)
    # A row of W_q: words of the low plane (for 3 bits the 2-bit plane), then of the high plane.
    low_words = tl.cdiv(K * (2 if NBITS == 3 else NBITS), 128) * 4
    row_words = low_words + (tl.cdiv(K, 128) * 4 if NBITS == 3 else 0)
    wait_for_kernel_ahead(PDL)
    groups = K // GROUP_SIZE // GROUPS_DIVISOR * GROUPS_DIVISOR
    W_q_ptr = W_q_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    partial_ptr += split.to(tl.int64) * N * BLOCK_M
    # Everything that depends on x alone is computed once, before the loop over rows of the weight.
    x_blocks, x_sums, offsets = load_operands(
        x_ptr=x_ptr,
        x_stride=x_stride * X_STRIDE_DIVISOR,
        M=M,
        K=K,
        split=split,
        NBITS=NBITS,
        BLOCK_M=BLOCK_M,
        BLOCK_K=BLOCK_K,
        K_SLICES=K_SLICES,
        GROUP_K=GROUP_K,
        DOT_K=DOT_K,
        FIELDS_PER_SHIFT=FIELDS_PER_SHIFT,
        CODE_OFFSET=CODE_OFFSET,
        ADJACENT_PAIRS=ADJACENT_PAIRS,
        EVEN_K=EVEN_K,
        UPCAST=UPCAST,
    )
    row = tl.arange(0, BLOCK_N)  # row of the weight, counted from row n, the first of a step
    steps, programs = tl.cdiv(N, BLOCK_N), tl.num_programs(1)
    for step in tl.range(tl.program_id(1), steps, programs, num_stages=NUM_STAGES):
        n = tl.minimum(step * BLOCK_N, N - BLOCK_N).to(tl.int64)
        # codes [K_SLICES * BLOCK_N, BLOCK_K], as the 16-bit floats of `operand_format`.
        codes = load_codes(
            row_ptrs=(W_q_ptr + n * row_words) + row * row_words,
            split=split,
            low_words=low_words,
            K=K,
            NBITS=NBITS,
            BLOCK_K=BLOCK_K,
            K_SLICES=K_SLICES,
            FIELDS_PER_SHIFT=FIELDS_PER_SHIFT,
            ADJACENT_PAIRS=ADJACENT_PAIRS,
            EVEN_K=EVEN_K,
            DTYPE=DTYPE,
        )
        codes = tl.reshape(codes, (K_SLICES * BLOCK_N, BLOCK_K // DOT_K, DOT_K))
        scale = load_scales(
            row_ptrs=(scale_ptr + n * groups) + row * groups,
            step=split,
            groups=groups,
            GROUP_SIZE=GROUP_SIZE,
            BLOCK_K=BLOCK_K,
            K_SLICES=K_SLICES,
            EVEN_K=EVEN_K,
        )
        zero = load_scales(
            row_ptrs=(zero_ptr + n * groups) + row * groups,
            step=split,
            groups=groups,
            GROUP_SIZE=GROUP_SIZE,
            BLOCK_K=BLOCK_K,
            K_SLICES=K_SLICES,
            EVEN_K=EVEN_K,
        )
        acc = tl.zeros((K_SLICES, BLOCK_N, BLOCK_M), tl.float32)
        for g in tl.static_range(BLOCK_K // GROUP_K):
            group_scale = tl.reshape(take(scale, g), (K_SLICES, BLOCK_N, 1)).to(tl.float32)
            group_zero = tl.reshape(take(zero, g), (K_SLICES, BLOCK_N, 1)).to(tl.float32)
            # The tensor cores add (CODE_OFFSET + code) * x. The sum starts from minus `offsets`,
            # which leaves the sum of code * x, in multiples of CODE_STEP.
            group_sum = tl.zeros((K_SLICES, BLOCK_N, BLOCK_M), tl.float32)
            if CODE_OFFSET > 0:
                group_sum -= offsets[g]
            for j in tl.static_range(g * DOTS_PER_GROUP, (g + 1) * DOTS_PER_GROUP):
                dot_codes = tl.reshape(take(codes, j), (K_SLICES, BLOCK_N, DOT_K))
                group_sum = dot(dot_codes, x_blocks[j], acc=group_sum, UPCAST=UPCAST)
            # scale * (sum(code * x) - zero * sum(x)). The sum of codes is in multiples of
            # CODE_STEP, so the zero is multiplied by it and the scale divided.
            group_sum -= (group_zero * CODE_STEP) * x_sums[g]
            acc += group_sum * (group_scale * (1 / CODE_STEP))
        y = sum_slices(acc, K_SLICES)
        offset = row[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        tl.store((partial_ptr + n * BLOCK_M) + offset, y)
