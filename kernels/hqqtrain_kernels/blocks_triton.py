"""What one step of the linear kernel reads: blocks of the packed weight, its scale and zero, and x.

A step takes `PARTS` neighbouring stretches of `SPAN` codes of every row. `WHOLE`: all stretches end
within the row, so that nothing needs a mask.
"""

import triton
import triton.language as tl


@triton.jit
def words(
    rows, step, end, WIDTH: tl.constexpr, SPAN: tl.constexpr, PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Words [PARTS * rows, those of SPAN codes]; zero from word `end` of a row on.

    Read in runs of 32 bytes, which then lie close in shared memory, where 8 rows are read at once:
    whole rows would meet in the same banks (8 reads instead of 1).
    """
    COUNT: tl.constexpr = SPAN * WIDTH // 32
    RUN: tl.constexpr = 8 if PARTS * COUNT >= 8 else PARTS * COUNT
    run = tl.arange(0, PARTS * COUNT // RUN)[:, None, None] * RUN
    at = step * (PARTS * COUNT) + run + tl.arange(0, RUN)[None, None, :]
    if WHOLE:
        t = tl.load(rows[None, :, None] + at)
    else:
        t = tl.load(rows[None, :, None] + at, mask=at < end, other=0)
    t = tl.reshape(tl.permute(t, (1, 0, 2)), (rows.shape[0], PARTS, COUNT))
    return tl.reshape(tl.permute(t, (1, 0, 2)), (PARTS * rows.shape[0], COUNT))


@triton.jit
def meta(
    rows, step, groups, GROUP: tl.constexpr, SPAN: tl.constexpr, PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Scale or zero of the units of a step: [PARTS * rows, units, 1]."""
    UNITS: tl.constexpr = SPAN // GROUP if GROUP < SPAN else 1
    at = step * (PARTS * UNITS) + tl.arange(0, PARTS * UNITS)[None, :]
    if GROUP > SPAN:
        at = at // (GROUP // SPAN)
    if WHOLE:
        t = tl.load(rows[:, None] + at)
    else:
        t = tl.load(rows[:, None] + at, mask=at < groups, other=0.0)
    t = tl.permute(tl.reshape(t, (rows.shape[0], PARTS, UNITS)), (1, 0, 2))
    return tl.reshape(t, (PARTS * rows.shape[0], UNITS, 1))


@triton.jit
def x_chunk(
    x, stride, m, M, K, step, j, CHUNK: tl.constexpr, SPAN: tl.constexpr, PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Chunk j of every part, transposed: [PARTS, CHUNK, BATCH]."""
    row = m.to(tl.int64) * stride
    k = step * (PARTS * SPAN) + j * CHUNK + tl.arange(0, CHUNK)
    if PARTS > 1:
        k = k[None, :, None] + (tl.arange(0, PARTS) * SPAN)[:, None, None]
        row = row[None, None, :]
        inside = (m < M)[None, None, :]
    else:
        k = k[:, None]
        row = row[None, :]
        inside = (m < M)[None, :]
    if not WHOLE:
        inside = inside & (k < K)
    return tl.load(x + row + k, mask=inside, other=0.0)


@triton.jit
def x_sums(
    x, stride, M, K, step, UNIT: tl.constexpr, BATCH: tl.constexpr, SPAN: tl.constexpr,
    PARTS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Sums of x over the units of a step: [PARTS * BATCH, units, 1].

    As a 2-D block: in others the compiler has every warp add up all of it (15 instead of 3
    instructions for a weight).
    """
    UNITS: tl.constexpr = SPAN // UNIT
    i = tl.arange(0, BATCH * PARTS * UNITS)
    m = tl.program_id(1) * BATCH + i // (PARTS * UNITS)
    k = step * (PARTS * SPAN) + (i % (PARTS * UNITS) * UNIT)[:, None] + tl.arange(0, UNIT)[None, :]
    inside = (m < M)[:, None]
    if not WHOLE:
        inside = inside & (k < K)
    block = tl.load(x + (m.to(tl.int64) * stride)[:, None] + k, mask=inside, other=0.0)
    t = tl.reshape(tl.sum(block.to(tl.float32), 1), (BATCH, PARTS, UNITS))
    return tl.reshape(tl.permute(t, (1, 0, 2)), (PARTS * BATCH, UNITS, 1))


@triton.jit
def read_sum(
    sums, m, M, K, step, unit, UNIT: tl.constexpr, SPAN: tl.constexpr, PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """The sums of one unit of every part, from `sums` [M, K / UNIT]: [PARTS, BATCH]."""
    row = m.to(tl.int64) * (K // UNIT)
    inside = m < M
    at = step * (PARTS * SPAN // UNIT) + unit
    if PARTS > 1:
        at += (tl.arange(0, PARTS) * (SPAN // UNIT))[:, None]
        row = row[None, :]
        inside = inside[None, :]
    else:
        at += tl.zeros_like(m)  # a block: the interpreter takes no mask of a number
    if not WHOLE:
        inside = inside & (at < K // UNIT)
    return tl.load(sums + row + at, mask=inside, other=0.0)
