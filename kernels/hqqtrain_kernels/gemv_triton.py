"""The linear kernel for one row of x (GEMV): only registers between memory and tensor cores.

A program is one warp. It keeps one split of x (BLOCK_K elements) in registers and streams the same
split of many rows of the weight past it, BLOCK_N = 16 rows per step, read ahead into registers.
`reduce_split_k` adds the splits.

One load of a lane is 16 bytes of a row of the weight, which is one tile. The 4 lanes over which the
tensor cores add hold codes of 4 tiles (a quad), which belong to several groups. Their sums are kept
apart all the same. A product has at least 8 columns, of which one row of x would need only one: so
each column gets the x of one group, and zeros elsewhere. Scale and zero are then applied to the
sums of all groups once per split:

    y[n] = sum over groups g of scale[n, g] * (sum_k code[n, k] x[k] - zero[n, g] * sum_k x[k])
"""

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqqtrain_kernels.heuristics import GemvConfig
from hqqtrain_kernels.launcher_triton import INTERPRETED, MAX_REGISTERS, CachedKernel
from hqqtrain_kernels.layout import Layout
from hqqtrain_kernels.loads_triton import dot
from hqqtrain_kernels.split_k_triton import TRITON_DTYPES, reduce_split_k, steps_per_program
from hqqtrain_kernels.unpack_triton import (
    ADJACENT_PAIRS,
    codes_to_pairs,
    opaque_constant,
    operand_format,
    pairs_to_halves,
)

BLOCK_N = 16
"""Rows of the weight per step: the rows of a tensor core product. The kernel spells it out."""


def gemv(
    x: Tensor,
    W_q: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    layout: Layout,
    config: GemvConfig,
) -> Tensor:
    """Compute y [1, N] from x [1, K] with adjacent elements."""
    K, N = layout.in_features, layout.out_features
    num_splits, steps = K // config.block_k, -(-N // BLOCK_N)
    per_program = steps_per_program(x.device, config.programs_per_sm, num_splits, steps)
    partial = torch.empty((num_splits, N, 1), dtype=torch.float32, device=x.device)
    kernel = _kernel_for(layout, config, x.dtype)
    kernel.launch(
        grid=(num_splits, -(-steps // per_program), 1),
        tensors={
            "x_ptr": x,
            "W_q_ptr": W_q,
            "scale_ptr": scale,
            "zero_ptr": zero,
            "partial_ptr": partial,
        },
        integers={"N": N, "K": K, "steps_per_program": per_program},
    )
    return reduce_split_k(partial=partial, bias=bias, x=x)


@functools.lru_cache(maxsize=4096)
def _kernel_for(layout: Layout, config: GemvConfig, dtype: torch.dtype) -> CachedKernel:
    """Return the kernel for a layout; layouts with equal constants share it."""
    return _cached_kernel(
        NBITS=layout.nbits,
        GROUP_SIZE=layout.group_size,
        GROUPS_DIVISOR=math.gcd(layout.groups, 8),
        BLOCK_K=config.block_k,
        NUM_GROUPS=max(1, config.block_k // layout.group_size),
        **operand_format(dtype, layout.nbits),
        ADJACENT_PAIRS=ADJACENT_PAIRS,
        DTYPE=TRITON_DTYPES[dtype],
        UPCAST=INTERPRETED,
    )


@functools.lru_cache(maxsize=4096)
def _cached_kernel(**constants: Any) -> CachedKernel:
    return CachedKernel(_gemv_kernel, constants, num_warps=1, maxnreg=MAX_REGISTERS)


@triton.jit(do_not_specialize=["N", "K", "steps_per_program"])
def _gemv_kernel(
    x_ptr,
    W_q_ptr,
    scale_ptr,
    zero_ptr,
    partial_ptr,
    N,
    K,
    steps_per_program,
    NBITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUPS_DIVISOR: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    FIELDS_PER_SHIFT: tl.constexpr,
    CODE_OFFSET: tl.constexpr,
    CODE_UNIT: tl.constexpr,
    ADJACENT_PAIRS: tl.constexpr,
    DTYPE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write partial_ptr [num_splits, N]: the products over one split of K, with NUM_GROUPS scales.

    Where 16 does not divide N, the last step begins 16 rows before the end: those rows are computed
    twice, with equal bits. `skinny_gemm_triton` explains the divisor.
    """
    QUADS: tl.constexpr = BLOCK_K * NBITS // 512  # of tiles, along a split of a row
    split = tl.program_id(0)
    row_words = tl.cdiv(K * NBITS, 128) * 4
    groups = K // GROUP_SIZE // GROUPS_DIVISOR * GROUPS_DIVISOR
    W_q_ptr = W_q_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + split * (BLOCK_K * NBITS // 32)
    # The first group of the split; or the group that holds the split, if groups are longer.
    group = split * NUM_GROUPS if GROUP_SIZE <= BLOCK_K else split // (GROUP_SIZE // BLOCK_K)
    first = tl.program_id(1) * steps_per_program
    end = tl.minimum(first + steps_per_program, tl.cdiv(N, 16))
    # The first rows are on their way while x is prepared, and each step loads the next one's rows.
    n = tl.minimum(first * 16, N - 16).to(tl.int64)
    words = _load_quads(ptr=W_q_ptr + n * row_words, row_words=row_words, QUADS=QUADS)
    x_quads, x_sums, offsets = _load_operands(
        x_ptr=x_ptr + split * BLOCK_K,
        NBITS=NBITS,
        QUADS=QUADS,
        CODES_PER_GROUP=BLOCK_K // NUM_GROUPS,
        NUM_GROUPS=NUM_GROUPS,
        FIELDS_PER_SHIFT=FIELDS_PER_SHIFT,
        CODE_OFFSET=CODE_OFFSET,
        ADJACENT_PAIRS=ADJACENT_PAIRS,
        UPCAST=UPCAST,
    )
    partial_ptr += split.to(tl.int64) * N + tl.arange(0, 16)
    for step in tl.range(first, end, num_stages=1):
        n = tl.minimum(step * 16, N - 16).to(tl.int64)
        next_n = tl.minimum((step + 1) * 16, N - 16).to(tl.int64)
        next_words = _load_quads(ptr=W_q_ptr + next_n * row_words, row_words=row_words, QUADS=QUADS)
        scale = _load_scales(
            ptr=scale_ptr + n * groups + group, groups=groups, NUM_GROUPS=NUM_GROUPS
        )
        zero = _load_scales(ptr=zero_ptr + n * groups + group, groups=groups, NUM_GROUPS=NUM_GROUPS)
        # p [16 rows, NUM_GROUPS]: column g adds up (CODE_OFFSET + code) * x over group g alone.
        p = tl.zeros((16, NUM_GROUPS), tl.float32)
        for i in tl.static_range(QUADS):
            pairs = codes_to_pairs(
                words[i],
                WIDTH=NBITS,
                FIRST_BIT=0,
                FIELDS_PER_SHIFT=FIELDS_PER_SHIFT,
                ADJACENT_PAIRS=ADJACENT_PAIRS,
            )
            if tl.bfloat16 == DTYPE:
                pairs |= opaque_constant(0x43004300, 16)  # the exponent of 128, in both halfwords
            p = dot(pairs_to_halves(pairs, DTYPE), x_quads[i], acc=p, UPCAST=UPCAST)
        # scale * (sum(code * x) - zero * sum(x)), CODE_UNIT divided out along with the scale.
        p = (p - offsets - (zero * CODE_UNIT) * x_sums) * (scale * (1 / CODE_UNIT))
        tl.store(partial_ptr + n, tl.sum(p, 1))
        words = next_words


@triton.jit
def _load_quads(ptr, row_words, QUADS: tl.constexpr):
    """Load the quads of 16 rows, from `ptr` on: a tuple of blocks [16 rows, 4 words, 4 tiles].

    They get the layout that tensor cores take: 4 lanes along a row and 8 rows in a load, and a
    second load for the other 8 rows.
    """
    row = tl.arange(0, 8)[:, None, None]
    tile = tl.arange(0, 4)[None, :, None]
    word = tl.arange(0, 4)[None, None, :]
    at = tl.max_contiguous(row * row_words + tile * 4 + word, (1, 2, 4))
    quads = ()
    for i in tl.static_range(QUADS):
        upper = tl.load(ptr + at + i * 16, cache_modifier=".cg")
        lower = tl.load(ptr + (at + 8 * row_words) + i * 16, cache_modifier=".cg")
        both = tl.permute(tl.join(upper, lower), (3, 0, 2, 1))
        quads += (tl.reshape(both, (16, 4, 4)),)
    return quads


@triton.jit
def _load_scales(ptr, groups, NUM_GROUPS: tl.constexpr):
    """Load scale or zero of 16 rows as fp32 [16, NUM_GROUPS].

    They get the layout of the products, in which a lane has 2 of 8 columns.
    """
    PAIR: tl.constexpr = 2 if NUM_GROUPS > 1 else 1
    row = tl.arange(0, 8)[:, None, None]
    pair = tl.arange(0, NUM_GROUPS // PAIR)[None, :, None] * PAIR
    at = row * groups + pair + tl.arange(0, PAIR)[None, None, :]
    both = tl.join(tl.load(ptr + at), tl.load(ptr + (at + 8 * groups)))
    return tl.reshape(tl.permute(both, (3, 0, 1, 2)), (16, NUM_GROUPS)).to(tl.float32)


@triton.jit
def _load_operands(
    x_ptr,
    NBITS: tl.constexpr,
    QUADS: tl.constexpr,
    CODES_PER_GROUP: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    FIELDS_PER_SHIFT: tl.constexpr,
    CODE_OFFSET: tl.constexpr,
    ADJACENT_PAIRS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Load one split of x, and prepare all that the products need of it.

    Returns:
        x_quads: For every quad, x [codes of a quad, NUM_GROUPS] in the order of the codes, zero in
            the columns of other groups.
        x_sums: The sum of x over every group, [1, NUM_GROUPS].
        offsets: CODE_OFFSET times the sum of what multiplies the codes, [1, NUM_GROUPS].

    The sums are computed by tensor cores, as products with ones: the result then has the layout of
    the products it is used with.
    """
    QUAD: tl.constexpr = 512 // NBITS  # codes of a quad
    x_quads = ()
    x_sums = tl.zeros((16, NUM_GROUPS), tl.float32)
    scaled_sums = x_sums
    k = _code_order(NBITS, ADJACENT_PAIRS)
    # Codes of fields that share a shift are not shifted down individually: the operand is
    # code * 2**(NBITS * place), and x is divided by that power of two.
    place = k // 8 % (16 // NBITS) % FIELDS_PER_SHIFT
    power = ((127 - place * NBITS) << 23).to(tl.float32, bitcast=True)
    ones = tl.full((16, QUAD), 1.0, x_ptr.dtype.element_ty)
    for i in tl.static_range(QUADS):
        in_group = (i * QUAD + k)[:, None] // CODES_PER_GROUP == tl.arange(0, NUM_GROUPS)[None, :]
        b = tl.where(in_group, tl.load(x_ptr + (i * QUAD + k))[:, None], 0.0)
        x_sums = dot(ones, b, acc=x_sums, UPCAST=UPCAST)
        if FIELDS_PER_SHIFT > 1:
            b = (b.to(tl.float32) * power[:, None]).to(b.dtype)
        if CODE_OFFSET > 0:
            scaled_sums = dot(ones, b, acc=scaled_sums, UPCAST=UPCAST)
        x_quads += (b,)
    # All 16 rows of the sums are equal: the maximum is any of them.
    return x_quads, tl.max(x_sums, 0)[None, :], tl.max(scaled_sums, 0)[None, :] * CODE_OFFSET


@triton.jit
def _code_order(NBITS: tl.constexpr, ADJACENT_PAIRS: tl.constexpr):
    """Return which code of a quad `codes_to_pairs` leaves where, after `_load_quads`.

    The order is: word, fields by ADJACENT_PAIRS, tile, ADJACENT_PAIRS fields, 2. Its length is the
    codes of a quad.
    """
    TILE: tl.constexpr = 128 // NBITS  # codes of a tile
    i = tl.arange(0, 4 * TILE)
    # Take the number of an operand apart, from its slowest dimension to its fastest.
    word = i // TILE
    tile = i // (2 * ADJACENT_PAIRS) % 4
    fields = i // (8 * ADJACENT_PAIRS) % (16 // NBITS // ADJACENT_PAIRS) * ADJACENT_PAIRS
    field = fields + i // 2 % ADJACENT_PAIRS
    # Field i of word w of a tile holds the codes 8 i + 2 w and 8 i + 2 w + 1: see `unpack_triton`.
    return tile * TILE + 8 * field + 2 * word + i % 2
