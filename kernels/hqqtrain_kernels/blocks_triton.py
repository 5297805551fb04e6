"""What a step of the linear kernels reads: blocks of the packed weight, scale and zero, and x.

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
    """Chunk j of every part, transposed, for rows m of x: [PARTS, CHUNK, BATCH].

    One part is 2-D, and no view of a 3-D block: from that, wgmma would not read it.
    """
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
def dot(a, b, acc, UPCAST: tl.constexpr):
    """acc + a b; with UPCAST in fp32, for the interpreter, where bf16 products are wrong."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")
