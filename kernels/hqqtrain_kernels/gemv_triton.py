"""The linear kernel for one row of x (GEMV): only registers between memory and tensor cores.

A program is one warp. It keeps one split of x (BLOCK_K elements) in registers and streams the same
split of many rows of the weight past it, BLOCK_N = 16 rows per step. The rows of the next step are
loaded into registers while the current ones are multiplied. `reduce_split_k` adds the splits.

A lane loads 16 bytes of a row of the weight, which are one tile of the packed layout (see
`layout`): 4 words of 32 bits with the codes of several fields. A quad is 4 adjacent tiles of a row,
which 4 lanes load. The tensor cores add over these 4 lanes, although the codes of a quad can belong
to several groups, with different scales. The sums of the groups are kept apart by the columns of
the product: it has at least 8 columns, of which one row of x needs only one. Column g gets x within
group g, and zeros elsewhere. Scale and zero are then applied to the sums of all groups once per
split:

    y[n] = sum over groups g of scale[n, g] * (sum_k code[n, k] x[k] - zero[n, g] * sum_k x[k])

where k runs over the elements of group g.
"""

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqqtrain_kernels.heuristics import GemvConfig
from hqqtrain_kernels.launcher_triton import (
    INTERPRETED,
    MAX_REGISTERS,
    TRITON_DTYPES,
    CachedKernel,
)
from hqqtrain_kernels.layout import Layout
from hqqtrain_kernels.loads_triton import dot
from hqqtrain_kernels.pdl_triton import supports_pdl, wait_for_kernel_ahead
from hqqtrain_kernels.split_k_triton import programs_per_split, reduce_split_k
from hqqtrain_kernels.unpack_triton import (
    ADJACENT_PAIRS,
    codes_to_pairs,
    opaque_constant,
    operand_format,
    pairs_to_halves,
)

BLOCK_N = 16
"""Rows of the weight per step, those of a tensor core product. The kernel writes 16 instead."""


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
    programs = programs_per_split(x.device, config.programs_per_sm, num_splits, steps)
    partial = torch.empty((num_splits, N, 1), dtype=torch.float32, device=x.device)
    kernel = _kernel_for(layout, config, x.dtype, supports_pdl(x.device))
    kernel.launch(
        grid=(num_splits, programs, 1),
        tensors={
            "x_ptr": x,
            "W_q_ptr": W_q,
            "scale_ptr": scale,
            "zero_ptr": zero,
            "partial_ptr": partial,
        },
        integers={"N": N, "K": K},
    )
    return reduce_split_k(partial=partial, bias=bias, x=x)


@functools.lru_cache(maxsize=4096)
def _kernel_for(layout: Layout, config: GemvConfig, dtype: torch.dtype, pdl: bool) -> CachedKernel:
    """Return the kernel for a layout; layouts with equal constants share it."""
    return _cached_kernel(
        NBITS=layout.nbits,
        GROUP_SIZE=layout.group_size,
        GROUPS_DIVISOR=math.gcd(layout.groups, 8),
        BLOCK_K=config.block_k,
        CODES_PER_GROUP=min(layout.group_size, config.block_k),
        **operand_format(dtype, layout.nbits),
        ADJACENT_PAIRS=ADJACENT_PAIRS,
        DTYPE=TRITON_DTYPES[dtype],
        UPCAST=INTERPRETED,
        PDL=pdl,
    )


@functools.lru_cache(maxsize=4096)
def _cached_kernel(**constants: Any) -> CachedKernel:
    return CachedKernel(_gemv_kernel, constants, num_warps=1, maxnreg=MAX_REGISTERS)


@triton.jit(do_not_specialize=["N", "K"])
def _gemv_kernel(
    x_ptr,
    W_q_ptr,
    scale_ptr,
    zero_ptr,
    partial_ptr,
    N,
    K,
    NBITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUPS_DIVISOR: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CODES_PER_GROUP: tl.constexpr,
    FIELDS_PER_SHIFT: tl.constexpr,
    CODE_OFFSET: tl.constexpr,
    CODE_STEP: tl.constexpr,
    ADJACENT_PAIRS: tl.constexpr,
    DTYPE: tl.constexpr,
    UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):
    """Write partial_ptr [num_splits, N]: the products over one split of K.

    NUM_GROUPS is the number of groups in a split, or 1 if a group is longer. `operand_format`
    explains FIELDS_PER_SHIFT, CODE_OFFSET and CODE_STEP, and `skinny_gemm_triton` explains
    GROUPS_DIVISOR.

    If 16 does not divide N, the last step begins 16 rows before the end. It computes some rows a
    second time, with equal bits.
    """
    wait_for_kernel_ahead(PDL)
    QUADS: tl.constexpr = BLOCK_K * NBITS // 512  # quads of 512 bits in a split of a row
    NUM_GROUPS: tl.constexpr = BLOCK_K // CODES_PER_GROUP
    split = tl.program_id(0)
    row_words = tl.cdiv(K * NBITS, 128) * 4
    groups = K // GROUP_SIZE // GROUPS_DIVISOR * GROUPS_DIVISOR
    W_q_ptr = W_q_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + split * (BLOCK_K * NBITS // 32)
    # The first group of the split, or the group that contains the split if groups are longer.
    group = split * NUM_GROUPS if GROUP_SIZE <= BLOCK_K else split // (GROUP_SIZE // BLOCK_K)
    first_step, stride = tl.program_id(1), tl.num_programs(1)
    # Start to load the first rows before x is prepared. Each step then loads the rows of the next.
    n = tl.minimum(first_step * 16, N - 16).to(tl.int64)
    words = _load_quads(ptr=W_q_ptr + n * row_words, row_words=row_words, QUADS=QUADS)
    x_quads, x_sums, offsets = _load_operands(
        x_ptr=x_ptr + split * BLOCK_K,
        NBITS=NBITS,
        QUADS=QUADS,
        CODES_PER_GROUP=CODES_PER_GROUP,
        FIELDS_PER_SHIFT=FIELDS_PER_SHIFT,
        CODE_OFFSET=CODE_OFFSET,
        ADJACENT_PAIRS=ADJACENT_PAIRS,
        UPCAST=UPCAST,
    )
    partial_ptr += split.to(tl.int64) * N + tl.arange(0, 16)
    for step in tl.range(first_step, tl.cdiv(N, 16), stride, num_stages=1):
        n = tl.minimum(step * 16, N - 16).to(tl.int64)
        next_n = tl.minimum((step + stride) * 16, N - 16).to(tl.int64)
        next_words = _load_quads(ptr=W_q_ptr + next_n * row_words, row_words=row_words, QUADS=QUADS)
        scale = _load_scales(
            ptr=scale_ptr + n * groups + group, groups=groups, NUM_GROUPS=NUM_GROUPS
        )
        zero = _load_scales(ptr=zero_ptr + n * groups + group, groups=groups, NUM_GROUPS=NUM_GROUPS)
        # Column g adds up (CODE_OFFSET + code) * x over group g alone. scale * (sum(code * x) -
        # zero * sum(x)) follows. The sum of codes is in multiples of CODE_STEP, so the zero is
        # multiplied by it and the scale divided. The quads have sums of their own, since a tensor
        # core product must wait for the one whose sum it continues. They are scaled before they
        # are added, as Triton would otherwise let one product continue the other again.
        scale *= 1 / CODE_STEP
        products = (offsets + (zero * CODE_STEP) * x_sums) * -scale
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
            codes = pairs_to_halves(pairs, DTYPE)
            zeros = tl.zeros((16, 8), tl.float32)
            products += dot(codes, x_quads[i], acc=zeros, UPCAST=UPCAST) * scale
        tl.store(partial_ptr + n, tl.sum(products, 1))
        words = next_words


@triton.jit
def _load_quads(ptr, row_words, QUADS: tl.constexpr):
    """Load the quads of 16 rows, from `ptr` on: a tuple of blocks [16 rows, 4 words, 4 tiles].

    The lanes get the words that the tensor cores take from them: one load covers 8 rows with 4
    lanes along each, and a second load covers the other 8 rows.
    """
    row = tl.arange(0, 8)[:, None, None]
    tile = tl.arange(0, 4)[None, :, None]
    word = tl.arange(0, 4)[None, None, :]
    offset = tl.max_contiguous(row * row_words + tile * 4 + word, (1, 2, 4))
    quads = ()
    for i in tl.static_range(QUADS):
        # A quad has 16 words. ".cg" bypasses the L1 cache, as every word is read once.
        rows_0_to_7 = tl.load(ptr + offset + i * 16, cache_modifier=".cg")
        rows_8_to_15 = tl.load(ptr + (offset + 8 * row_words) + i * 16, cache_modifier=".cg")
        # [8 rows, 4 tiles, 4 words, 2 halves] -> [2 halves, 8 rows, 4 words, 4 tiles].
        all_rows = tl.permute(tl.join(rows_0_to_7, rows_8_to_15), (3, 0, 2, 1))
        quads += (tl.reshape(all_rows, (16, 4, 4)),)
    return quads


@triton.jit
def _load_scales(ptr, groups, NUM_GROUPS: tl.constexpr):
    """Load scale or zero of 16 rows as fp32 [16, 8], with zeros in the columns without a group.

    They are loaded in the register layout of the product, in which a lane has 2 of 8 columns.
    """
    row = tl.arange(0, 8)[:, None, None]
    column = tl.arange(0, 4)[None, :, None] * 2 + tl.arange(0, 2)[None, None, :]
    offset = row * groups + column
    mask = column < NUM_GROUPS
    # [8 rows, 4 pairs, 2 columns, 2 halves of the rows] -> [16 rows, 8].
    all_rows = tl.join(
        tl.load(ptr + offset, mask=mask, other=0.0),
        tl.load(ptr + (offset + 8 * groups), mask=mask, other=0.0),
    )
    return tl.reshape(tl.permute(all_rows, (3, 0, 1, 2)), (16, 8)).to(tl.float32)


@triton.jit
def _load_operands(
    x_ptr,
    NBITS: tl.constexpr,
    QUADS: tl.constexpr,
    CODES_PER_GROUP: tl.constexpr,
    FIELDS_PER_SHIFT: tl.constexpr,
    CODE_OFFSET: tl.constexpr,
    ADJACENT_PAIRS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Load one split of x, and prepare all that the products need of it.

    Returns:
        x_quads: For every quad, x [codes of a quad, 8] in the order of the codes. An
            element is zero in the columns of the groups that it does not belong to.
        x_sums: The sum of x over every group, [1, 8].
        offsets: What CODE_OFFSET adds to the sum of every group, [1, 8]: CODE_OFFSET times the sum
            of x_quads.

    The tensor cores compute the sums, as products with ones. The sums then have the same register
    layout as the products that they are used with.
    """
    QUAD_CODES: tl.constexpr = 512 // NBITS
    x_quads = ()
    zeros = tl.zeros((16, 8), tl.float32)
    x_sums = zeros
    scaled_sums = zeros
    k = _code_order(NBITS, ADJACENT_PAIRS)
    # Codes of fields that share a shift are not shifted down individually: the operand is
    # code * 2**(NBITS * place), and x is divided by that power of two.
    place = k // 8 % (16 // NBITS) % FIELDS_PER_SHIFT
    inverse_power = ((127 - place * NBITS) << 23).to(tl.float32, bitcast=True)  # by its bits
    # Products with -1 are subtracted: Triton would chain products that are added.
    minus_ones = tl.full((16, QUAD_CODES), -1.0, x_ptr.dtype.element_ty)
    for i in tl.static_range(QUADS):
        group_of_k = (i * QUAD_CODES + k)[None, :] // CODES_PER_GROUP
        in_group = group_of_k == tl.arange(0, 8)[:, None]
        x_quad = tl.trans(tl.where(in_group, tl.load(x_ptr + (i * QUAD_CODES + k))[None, :], 0.0))
        x_sums -= dot(minus_ones, x_quad, acc=zeros, UPCAST=UPCAST)
        if FIELDS_PER_SHIFT > 1:
            x_quad = (x_quad.to(tl.float32) * inverse_power[:, None]).to(x_quad.dtype)
            scaled_sums -= dot(minus_ones, x_quad, acc=zeros, UPCAST=UPCAST)
        x_quads += (x_quad,)
    if FIELDS_PER_SHIFT == 1 and CODE_OFFSET > 0:
        scaled_sums = x_sums
    # All 16 rows of the sums are equal: the maximum is any of them.
    return x_quads, tl.max(x_sums, 0)[None, :], tl.max(scaled_sums, 0)[None, :] * CODE_OFFSET


@triton.jit
def _code_order(NBITS: tl.constexpr, ADJACENT_PAIRS: tl.constexpr):
    """Return the number in the quad of each code that `codes_to_pairs` extracts, [codes of a quad].

    After `_load_quads`, the codes are ordered by these dimensions, from the slowest to the fastest:
    word; runs of ADJACENT_PAIRS fields; tile; the fields of a run; the two codes of a pair.
    """
    TILE_CODES: tl.constexpr = 128 // NBITS
    # Split each position in this order into its dimensions.
    i = tl.arange(0, 4 * TILE_CODES)
    word = i // TILE_CODES
    tile = i // (2 * ADJACENT_PAIRS) % 4
    run_start = i // (8 * ADJACENT_PAIRS) % (16 // NBITS // ADJACENT_PAIRS) * ADJACENT_PAIRS
    field = run_start + i // 2 % ADJACENT_PAIRS
    # Field f of word w of a tile holds the codes 8 f + 2 w and 8 f + 2 w + 1: see `unpack_triton`.
    return tile * TILE_CODES + 8 * field + 2 * word + i % 2
