"""The linear kernel for up to 16 rows of x: x stays where it is, the weight streams past it.

A program holds one stretch of all rows of x and multiplies it with the same stretch of many rows
of the weight, some in each step of its loop. (A program that walked along its own rows would read
x again for them: at 16 rows of x more bytes than the weight has.) Each of `PARTS` warps takes a
part of the stretch.

The weight stands first in the product, y^T = W x^T: its codes come straight from the registers
that unpacked them. Their order there is that of the registers, and x is brought into it.
"""

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqqtrain_kernels.blocks_triton import dot, meta, words, x_chunk
from hqqtrain_kernels.fields_triton import (
    NEIGHBOURS,
    halves,
    hidden,
    integer_operands,
    integers,
    part,
)
from hqqtrain_kernels.launch_triton import INTERPRETED, MOST_REGISTERS, Variant
from hqqtrain_kernels.layout import Layout
from hqqtrain_kernels.partial_triton import DTYPES, add, steps_each
from hqqtrain_kernels.table import Skinny


def launch(
    x: Tensor, W_q: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, layout: Layout,
    settings: Skinny,
) -> Tensor:  # fmt: skip
    """[M, out_features], of x [M, in_features] with the elements of a row adjacent."""
    (M, K), N = x.shape, layout.out_features
    stretches = -(-K // (settings.span * settings.parts))
    steps = -(-N // settings.rows)
    each = steps_each(x.device, settings.programs, stretches, steps)
    partial = torch.empty((stretches, N, settings.batch), dtype=torch.float32, device=x.device)
    stride = x.stride(0)
    unit = 8 if stride % 8 == 0 else 1
    grid = (stretches, -(-steps // each), 1)
    variant = _variant(layout, settings, x.dtype, unit)
    variant.launch(grid, (x, W_q, scale, zero, partial), (M, N, K, stride // unit, each))
    return add(partial, bias, x)


@functools.lru_cache(maxsize=4096)
def _variant(layout: Layout, settings: Skinny, dtype: torch.dtype, unit: int) -> Variant:
    """The kernel for these; one and the same for all weights that differ in nothing it is told."""
    g, whole = layout.group_size, settings.span * settings.parts
    return _shared(
        NBITS=layout.nbits, GROUP=g, X_STEP=unit, META_STEP=math.gcd(layout.groups, 8),
        ROWS=settings.rows, BATCH=settings.batch, SPAN=settings.span, PARTS=settings.parts,
        UNIT=min(g, settings.span), CHUNK=min(g, 64), **integer_operands(dtype, layout.nbits),
        NEIGHBOURS=NEIGHBOURS, WHOLE=layout.in_features % whole == 0, DTYPE=DTYPES[dtype],
        UPCAST=INTERPRETED, STAGES=settings.stages,
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _shared(**constants: Any) -> Variant:
    warps, stages = constants["PARTS"], constants["STAGES"]
    return Variant(_skinny, constants, num_warps=warps, num_stages=stages, maxnreg=MOST_REGISTERS)


@triton.jit(do_not_specialize=["M", "N", "K", "x_stride", "each"])
def _skinny(
    x, W_q, scale, zero, partial, M, N, K, x_stride, each,
    NBITS: tl.constexpr, GROUP: tl.constexpr, X_STEP: tl.constexpr, META_STEP: tl.constexpr,
    ROWS: tl.constexpr, BATCH: tl.constexpr, SPAN: tl.constexpr, PARTS: tl.constexpr,
    UNIT: tl.constexpr, CHUNK: tl.constexpr, PLANES: tl.constexpr, OFFSET: tl.constexpr,
    TINY: tl.constexpr, NEIGHBOURS: tl.constexpr, WHOLE: tl.constexpr, DTYPE: tl.constexpr,
    UPCAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """UNIT codes share a scale in a step; CHUNK of them are multiplied at once.

    The last rows are done twice where ROWS does not divide N: no step needs a mask.
    """
    CHUNKS: tl.constexpr = UNIT // CHUNK
    stretch = tl.program_id(0)
    low_words = tl.cdiv(K * (2 if NBITS == 3 else NBITS), 128) * 4
    row_words = low_words + (tl.cdiv(K, 128) * 4 if NBITS == 3 else 0)
    groups = K // GROUP // META_STEP * META_STEP
    W_q = W_q.to(tl.pointer_type(tl.int32), bitcast=True)
    partial += stretch.to(tl.int64) * N * BATCH
    operands, sums, offsets = _x_operands(
        x, x_stride * X_STEP, M, K, stretch, NBITS, BATCH, SPAN, PARTS, UNIT, CHUNK, PLANES,
        OFFSET, NEIGHBOURS, WHOLE, UPCAST,
    )  # fmt: skip
    r = tl.arange(0, ROWS)
    first = tl.program_id(1) * each
    for step in tl.range(first, tl.minimum(first + each, tl.cdiv(N, ROWS)), num_stages=STAGES):
        n = tl.minimum(step * ROWS, N - ROWS).to(tl.int64)
        W = _weights(
            (W_q + n * row_words) + r * row_words, stretch, low_words, K, NBITS, SPAN, PARTS,
            PLANES, NEIGHBOURS, WHOLE, DTYPE,
        )  # fmt: skip
        W = tl.reshape(W, (PARTS * ROWS, SPAN // CHUNK, CHUNK))
        s = meta((scale + n * groups) + r * groups, stretch, groups, GROUP, SPAN, PARTS, WHOLE)
        z = meta((zero + n * groups) + r * groups, stretch, groups, GROUP, SPAN, PARTS, WHOLE)
        acc = tl.zeros((PARTS, ROWS, BATCH), tl.float32)
        for u in tl.static_range(SPAN // UNIT):
            s_unit = tl.reshape(part(s, u), (PARTS, ROWS, 1)).to(tl.float32)
            z_unit = tl.reshape(part(z, u), (PARTS, ROWS, 1)).to(tl.float32)
            p = tl.zeros((PARTS, ROWS, BATCH), tl.float32)
            if OFFSET > 0:
                p -= offsets[u]
            for j in tl.static_range(u * CHUNKS, (u + 1) * CHUNKS):
                a = tl.reshape(part(W, j), (PARTS, ROWS, CHUNK))
                p = dot(a, operands[j], p, UPCAST)
            acc += (p - (z_unit * TINY) * sums[u]) * (s_unit * (1 / TINY))
        y = _over_parts(acc, PARTS)
        at = r[:, None] * BATCH + tl.arange(0, BATCH)[None, :]
        tl.store((partial + n * BATCH) + at, y)


@triton.jit
def _weights(
    rows, stretch, low_words, K, NBITS: tl.constexpr, SPAN: tl.constexpr, PARTS: tl.constexpr,
    PLANES: tl.constexpr, NEIGHBOURS: tl.constexpr, WHOLE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The codes of one stretch of rows as 16-bit floats: [PARTS * rows, SPAN]."""
    WIDTH: tl.constexpr = 2 if NBITS == 3 else NBITS
    COUNT: tl.constexpr = PARTS * rows.shape[0]
    low = words(rows, stretch, low_words, WIDTH, SPAN, PARTS, WHOLE)
    low = tl.reshape(low, (COUNT, SPAN * WIDTH // 128, 4))
    pairs = integers(low, WIDTH, 0, PLANES, NEIGHBOURS)
    if tl.bfloat16 == DTYPE:
        pairs |= hidden(0x43004300, COUNT)
    if NBITS == 3:
        high = words(rows + low_words, stretch, tl.cdiv(K, 128) * 4, 1, SPAN, PARTS, WHOLE)
        high = tl.reshape(high, (COUNT, SPAN // 128, 4))
        pairs |= integers(high, 1, 2, PLANES, NEIGHBOURS)
    return halves(pairs, DTYPE)


@triton.jit
def _x_operands(
    x, x_stride, M, K, stretch, NBITS: tl.constexpr, BATCH: tl.constexpr, SPAN: tl.constexpr,
    PARTS: tl.constexpr, UNIT: tl.constexpr, CHUNK: tl.constexpr, PLANES: tl.constexpr,
    OFFSET: tl.constexpr, NEIGHBOURS: tl.constexpr, WHOLE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """What multiplies the codes of chunk j, and for unit u the sum of x, and OFFSET times the
    sum of what multiplies: tuples of [PARTS, CHUNK, BATCH] and [PARTS, 1, BATCH].

    Summed by tensor cores: the result lies as the products do, and needs no conversion per step.
    """
    operands = ()
    sums = ()
    offsets = ()
    m = tl.arange(0, BATCH)
    ones = tl.full((PARTS, 16, CHUNK), 1.0, x.dtype.element_ty)
    for u in tl.static_range(SPAN // UNIT):
        plain = tl.zeros((PARTS, 16, BATCH), tl.float32)
        scaled = plain
        for j in tl.static_range(u * (UNIT // CHUNK), (u + 1) * (UNIT // CHUNK)):
            b = x_chunk(x, x_stride, m, M, K, stretch, j, CHUNK, SPAN, PARTS, WHOLE)
            plain = dot(ones, b, plain, UPCAST)
            b = _scaled(b, j * CHUNK, NBITS, PLANES)
            if OFFSET > 0:
                scaled = dot(ones, b, scaled, UPCAST)
            operands += (_reordered(b, NEIGHBOURS),)
        sums += (tl.max(plain, 1)[:, None, :],)
        offsets += ((tl.max(scaled, 1) * OFFSET)[:, None, :],)
    return operands, sums, offsets


@triton.jit
def _scaled(b, k, NBITS: tl.constexpr, PLANES: tl.constexpr):
    """x from its element k on, divided by what codes are multiplied by where they lie."""
    if PLANES > 1:
        field = (k + tl.arange(0, b.shape[1])) // 8 % (16 // NBITS)
        power = ((127 - field % PLANES * NBITS) << 23).to(tl.float32, bitcast=True)
        b = (b.to(tl.float32) * power[None, :, None]).to(b.dtype)
    return b


@triton.jit
def _reordered(b, NEIGHBOURS: tl.constexpr):
    """As `integers` leaves the codes, within 8 * NEIGHBOURS of them."""
    parts: tl.constexpr = b.shape[0]
    chunk: tl.constexpr = b.shape[1]
    batch: tl.constexpr = b.shape[2]
    t = tl.reshape(b, (parts, chunk // 8 // NEIGHBOURS, NEIGHBOURS, 4, 2, batch))
    return tl.reshape(tl.permute(t, (0, 1, 3, 2, 4, 5)), (parts, chunk, batch))


@triton.jit
def _over_parts(acc, PARTS: tl.constexpr):
    """Sums [PARTS, rows, batch] over the parts: two and two, after one exchange between warps.

    `tl.sum` would exchange every number once per warp (2.9 instead of 3.5 instructions a weight
    for 16 rows of x at 4 bits).
    """
    rows: tl.constexpr = acc.shape[1]
    batch: tl.constexpr = acc.shape[2]
    t = tl.permute(acc, (1, 2, 0))
    for level in tl.static_range(5):
        if PARTS >> level > 1:
            even, odd = tl.split(tl.reshape(t, (rows, batch, PARTS >> (level + 1), 2)))
            t = even + odd
    return tl.reshape(t, (rows, batch))
