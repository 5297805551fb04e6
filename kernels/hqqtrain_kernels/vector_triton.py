"""The linear kernel for one row of x: nothing but registers between memory and tensor cores.

16 bytes of a row of the weight are one load of a lane, and one tile: so the 4 lanes that the tensor
cores add over hold codes of 4 tiles, which belong to several groups. Their sums are kept apart all
the same: of the 8 columns that a product has at least, one would do for one row of x, so each gets
x of one group, and zeros elsewhere. Scale and zero meet the sums once per stretch.

A program is one warp, which holds a stretch of x and streams the same stretch of many rows of the
weight past it, 16 of them at a time, read ahead into registers.
"""

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqqtrain_kernels.blocks_triton import dot
from hqqtrain_kernels.fields_triton import NEIGHBOURS, halves, hidden, integer_operands, integers
from hqqtrain_kernels.launch_triton import INTERPRETED, MOST_REGISTERS, Variant
from hqqtrain_kernels.layout import Layout
from hqqtrain_kernels.partial_triton import DTYPES, add, steps_each
from hqqtrain_kernels.table import Vector

ROWS = 16


def launch(
    x: Tensor, W_q: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, layout: Layout,
    settings: Vector,
) -> Tensor:  # fmt: skip
    """[1, out_features], of x [1, in_features] with the elements adjacent."""
    K, N = layout.in_features, layout.out_features
    stretches, steps = K // settings.stretch, -(-N // ROWS)
    each = steps_each(x.device, settings.programs, stretches, steps)
    partial = torch.empty((stretches, N, 1), dtype=torch.float32, device=x.device)
    variant = _variant(layout, settings, x.dtype)
    grid = (stretches, -(-steps // each), 1)
    variant.launch(grid, (x, W_q, scale, zero, partial), (N, K, each))
    return add(partial, bias, x)


@functools.lru_cache(maxsize=4096)
def _variant(layout: Layout, settings: Vector, dtype: torch.dtype) -> Variant:
    """The kernel for these; one and the same for all weights that differ in nothing it is told."""
    return _shared(
        NBITS=layout.nbits, GROUP=layout.group_size, META_STEP=math.gcd(layout.groups, 8),
        STRETCH=settings.stretch, GROUPS=max(1, settings.stretch // layout.group_size),
        **integer_operands(dtype, layout.nbits), NEIGHBOURS=NEIGHBOURS, DTYPE=DTYPES[dtype],
        UPCAST=INTERPRETED,
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _shared(**constants: Any) -> Variant:
    return Variant(_vector, constants, num_warps=1, maxnreg=MOST_REGISTERS)


@triton.jit(do_not_specialize=["N", "K", "each"])
def _vector(
    x, W_q, scale, zero, partial, N, K, each,
    NBITS: tl.constexpr, GROUP: tl.constexpr, META_STEP: tl.constexpr, STRETCH: tl.constexpr,
    GROUPS: tl.constexpr, PLANES: tl.constexpr, OFFSET: tl.constexpr, TINY: tl.constexpr,
    NEIGHBOURS: tl.constexpr, DTYPE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """GROUPS of a stretch have their own scale; the last rows are done twice where N is ragged."""
    QUADS: tl.constexpr = STRETCH * NBITS // 512
    stretch = tl.program_id(0)
    row_words = tl.cdiv(K * NBITS, 128) * 4
    groups = K // GROUP // META_STEP * META_STEP
    W_q = W_q.to(tl.pointer_type(tl.int32), bitcast=True) + stretch * (STRETCH * NBITS // 32)
    at = stretch * GROUPS if GROUP <= STRETCH else stretch // (GROUP // STRETCH)
    first = tl.program_id(1) * each
    end = tl.minimum(first + each, tl.cdiv(N, 16))
    n = tl.minimum(first * 16, N - 16).to(tl.int64)
    W = _read(W_q + n * row_words, row_words, QUADS)
    operands, sums, offsets = _x_operands(
        x + stretch * STRETCH, NBITS, QUADS, STRETCH // GROUPS, GROUPS, PLANES, OFFSET,
        NEIGHBOURS, UPCAST,
    )  # fmt: skip
    partial += stretch.to(tl.int64) * N + tl.arange(0, 16)
    for step in tl.range(first, end, num_stages=1):
        n = tl.minimum(step * 16, N - 16).to(tl.int64)
        after = tl.minimum((step + 1) * 16, N - 16).to(tl.int64)
        ahead = _read(W_q + after * row_words, row_words, QUADS)
        s = _meta(scale + n * groups + at, groups, GROUPS)
        z = _meta(zero + n * groups + at, groups, GROUPS)
        p = tl.zeros((16, GROUPS), tl.float32)
        for i in tl.static_range(QUADS):
            pairs = integers(W[i], NBITS, 0, PLANES, NEIGHBOURS)
            if tl.bfloat16 == DTYPE:
                pairs |= hidden(0x43004300, 16)
            p = dot(halves(pairs, DTYPE), operands[i], p, UPCAST)
        p = (p - offsets - (z * TINY) * sums) * (s * (1 / TINY))
        tl.store(partial + n, tl.sum(p, 1))
        W = ahead


@triton.jit
def _read(rows, row_words, QUADS: tl.constexpr):
    """Of 16 rows, word for word of 4 tiles: a tuple of [16, 4 words, 4 tiles].

    In the layout that tensor cores want: 4 lanes along a row, 8 rows, and 2 such loads.
    """
    g = tl.arange(0, 8)[:, None, None]
    tile = tl.arange(0, 4)[None, :, None]
    at = tl.max_contiguous(g * row_words + tile * 4 + tl.arange(0, 4)[None, None, :], (1, 2, 4))
    quads = ()
    for i in tl.static_range(QUADS):
        upper = tl.load(rows + at + i * 16, cache_modifier=".cg")
        lower = tl.load(rows + (at + 8 * row_words) + i * 16, cache_modifier=".cg")
        both = tl.permute(tl.join(upper, lower), (3, 0, 2, 1))
        quads += (tl.reshape(both, (16, 4, 4)),)
    return quads


@triton.jit
def _meta(rows, groups, GROUPS: tl.constexpr):
    """Scale or zero of 16 rows as the products lie, 2 of 8 columns in a lane: [16, GROUPS]."""
    PAIR: tl.constexpr = 2 if GROUPS > 1 else 1
    g = tl.arange(0, 8)[:, None, None]
    pair = tl.arange(0, GROUPS // PAIR)[None, :, None] * PAIR
    at = g * groups + pair + tl.arange(0, PAIR)[None, None, :]
    both = tl.join(tl.load(rows + at), tl.load(rows + (at + 8 * groups)))
    return tl.reshape(tl.permute(both, (3, 0, 1, 2)), (16, GROUPS)).to(tl.float32)


@triton.jit
def _x_operands(
    x, NBITS: tl.constexpr, QUADS: tl.constexpr, UNIT: tl.constexpr, GROUPS: tl.constexpr,
    PLANES: tl.constexpr, OFFSET: tl.constexpr, NEIGHBOURS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """For every quad of tiles [codes, GROUPS], zero where a code is of another group; and of all
    quads the sum of x and OFFSET times the sum of what multiplies, [1, GROUPS].

    Summed by tensor cores: the result lies as the products do.
    """
    QUAD: tl.constexpr = 512 // NBITS
    operands = ()
    sums = tl.zeros((16, GROUPS), tl.float32)
    offsets = sums
    k = _order(NBITS, NEIGHBOURS)
    power = ((127 - k // 8 % (16 // NBITS) % PLANES * NBITS) << 23).to(tl.float32, bitcast=True)
    ones = tl.full((16, QUAD), 1.0, x.dtype.element_ty)
    for i in tl.static_range(QUADS):
        own = (i * QUAD + k)[:, None] // UNIT == tl.arange(0, GROUPS)[None, :]
        b = tl.where(own, tl.load(x + (i * QUAD + k))[:, None], 0.0)
        sums = dot(ones, b, sums, UPCAST)
        if PLANES > 1:
            b = (b.to(tl.float32) * power[:, None]).to(b.dtype)
        if OFFSET > 0:
            offsets = dot(ones, b, offsets, UPCAST)
        operands += (b,)
    return operands, tl.max(sums, 0)[None, :], tl.max(offsets, 0)[None, :] * OFFSET


@triton.jit
def _order(NBITS: tl.constexpr, NEIGHBOURS: tl.constexpr):
    """Which code of 4 tiles `integers` leaves where, given `_read`: [4 * codes of a tile].

    By word, fields by NEIGHBOURS, tile, NEIGHBOURS fields, 2.
    """
    TILE: tl.constexpr = 128 // NBITS
    i = tl.arange(0, 4 * TILE)
    word = i // TILE
    tile = i // (2 * NEIGHBOURS) % 4
    field = i // (8 * NEIGHBOURS) % (16 // NBITS // NEIGHBOURS) * NEIGHBOURS + i // 2 % NEIGHBOURS
    return tile * TILE + 8 * field + 2 * word + i % 2
