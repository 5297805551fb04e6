"""Packed codes to dense weights on a GPU, at nearly the speed of copying as many bytes.

A training step dequantizes every weight twice, so this may cost no more than its memory traffic:
codes, scale and zero are read once, 16 bytes at a time, and the weights are written 16 bytes at a
time. The arithmetic, 10 to 13 instructions a weight, hides behind that.

The bits are those of `reference.dequantize`: no step before (code - zero) * scale rounds.

On an H200, outputs of 32 MB and more, groups of 64, as shares of the bandwidth of a copy of as
many bytes: axis 1 88 to 97 %; axis 0 86 to 94 % (writing alone, in its 256-byte pieces of rows, is
5 % slower than whole rows are), but at 3 bits 71 to 74 %.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqqtrain_kernels.launch_triton import Variant
from hqqtrain_kernels.layout import Layout, packed_bytes

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def dequantize(W_q: Tensor, scale: Tensor, zero: Tensor, layout: Layout, out: Tensor) -> None:
    """Writes (W_q - zero) * scale to `out`: computed in fp32, rounded once.

    W_q [units, row_bytes] is uint8 or the same bits viewed as a float; scale and zero are
    [units, groups]; all contiguous. out [out_features, in_features] is bf16, fp16 or fp32 with
    the elements of a row adjacent and any row stride: it may be a part of a larger buffer.

    Raises ValueError for other shapes, strides or dtypes.
    """
    _check(W_q, scale, zero, layout, out)
    stride = out.stride(0)
    step = 8 if stride % 8 == 0 else 1
    variant, programs = _plan(layout, step)
    variant.launch((programs, 1, 1), (W_q, scale, zero, out), (layout.units, stride // step))


def _check(W_q: Tensor, scale: Tensor, zero: Tensor, layout: Layout, out: Tensor) -> None:
    units, dense = layout.units, (layout.out_features, layout.in_features)
    if not (
        W_q.shape[0] == units and W_q.nbytes == units * layout.row_bytes
        and scale.shape == zero.shape == (units, layout.groups)
        and scale.dtype in DTYPES and zero.dtype in DTYPES
        and out.shape == dense and out.dtype in DTYPES
        and (out.stride(1) == 1 or dense[1] == 1)
        and W_q.is_contiguous() and scale.is_contiguous() and zero.is_contiguous()
    ):  # fmt: skip
        told = (f"{list(t.shape)} {t.dtype}, strides {t.stride()}" for t in (W_q, scale, zero, out))
        raise ValueError(
            f"{layout} needs W_q of {units} x {layout.row_bytes} bytes, scale and zero "
            f"{[units, layout.groups]}, contiguous, and out {list(dense)} with contiguous rows, "
            f"all but W_q bf16, fp16 or fp32; not {'; '.join(told)}"
        )


@functools.cache
def _plan(layout: Layout, step: int) -> tuple[Variant, int]:
    """The compiled kernel, and how many programs of it."""
    rows, columns, g = layout.out_features, layout.in_features, layout.group_size
    shared = {
        "IN": columns, "NBITS": layout.nbits, "GROUP": g, "ROW_BYTES": layout.row_bytes,
        "TOP": packed_bytes(layout.row_codes, 2), "STEP": step,
    }  # fmt: skip
    chunks, warps = _cut(layout)
    if g % 8:
        kernel, parts = _anywhere, {"AXIS": layout.axis, "ROWS": 8, "COLUMNS": 128}
        programs = -(-rows // 8) * -(-columns // 128)
    elif layout.axis == 1:
        kernel, parts = _rows, {"CHUNKS": chunks}
        programs = rows * -(-columns // (8 * chunks))
    else:
        deep = min(chunks // 128, triton.next_power_of_2(g // 8))
        wide = chunks // deep
        kernel, parts = _columns, {"COLUMNS": wide, "CHUNKS": deep}
        programs = layout.units * -(-columns // wide) * -(-g // (8 * deep))
    return Variant(kernel, shared | parts, num_warps=warps), programs


def _cut(layout: Layout) -> tuple[int, int]:
    """Chunks of 8 codes and warps of a program: the best on an H200 of those tried.

    A thread needs twice as many chunks for 3 bits, or waits for one plane after the other.
    """
    twice = layout.nbits == 3
    if layout.axis == 1:
        return 256, 2 if twice else 4
    return 1024 if twice else 512, 4


@triton.jit(do_not_specialize=["units", "stride"])
def _rows(
    W_q, scale, zero, out, units, stride,
    IN: tl.constexpr, NBITS: tl.constexpr, GROUP: tl.constexpr, ROW_BYTES: tl.constexpr,
    TOP: tl.constexpr, STEP: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Axis 1, groups of whole chunks: a program writes up to CHUNKS chunks of a row."""
    blocks: tl.constexpr = (IN // 8 + CHUNKS - 1) // CHUNKS
    row = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * CHUNKS
    chunk = tl.arange(0, CHUNKS)
    inside = chunk < IN // 8 - first
    group = row * (IN // GROUP) + (first + chunk) // (GROUP // 8)
    packed = W_q.to(tl.pointer_type(tl.uint8)) + row * ROW_BYTES
    W = _chunks(packed, packed + TOP, first, chunk, inside, scale + group, zero + group, NBITS)
    out += row * stride * STEP + first * 8
    at = chunk[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(out + at, W.to(out.dtype.element_ty), inside[:, None])


@triton.jit(do_not_specialize=["units", "stride"])
def _columns(
    W_q, scale, zero, out, units, stride,
    IN: tl.constexpr, NBITS: tl.constexpr, GROUP: tl.constexpr, ROW_BYTES: tl.constexpr,
    TOP: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Axis 0, groups of whole chunks: a program writes up to CHUNKS chunks of COLUMNS columns.

    A column's codes lie together, its weights apart by `units` rows: the block is transposed.
    """
    blocks: tl.constexpr = (IN + COLUMNS - 1) // COLUMNS
    depths: tl.constexpr = (GROUP // 8 + CHUNKS - 1) // CHUNKS
    depth = tl.program_id(0) % depths * CHUNKS
    first = tl.program_id(0) // depths % blocks * COLUMNS
    unit = (tl.program_id(0) // (depths * blocks)).to(tl.int64)
    i = tl.arange(0, COLUMNS * CHUNKS)
    column, chunk = i // CHUNKS, depth + i % CHUNKS
    inside = (column < IN - first) & (chunk < GROUP // 8)
    group = unit * IN + first + column
    packed = W_q.to(tl.pointer_type(tl.uint8)) + unit * ROW_BYTES
    W = _chunks(
        packed, packed + TOP, first.to(tl.int64) * (GROUP // 8), column * (GROUP // 8) + chunk,
        inside, scale + group, zero + group, NBITS,
    )  # fmt: skip
    W = tl.reshape(W.to(out.dtype.element_ty), COLUMNS, CHUNKS * 8).T
    row = depth * 8 + tl.arange(0, CHUNKS * 8)
    column = tl.arange(0, COLUMNS)
    apart = units.to(tl.int64) * stride * STEP
    out += unit * stride * STEP + first
    inside = (row < GROUP)[:, None] & (column < IN - first)[None, :]
    tl.store(out + (row * apart)[:, None] + column[None, :], W, inside)


@triton.jit
def _chunks(low, top, first, chunk, inside, scale, zero, NBITS: tl.constexpr):
    """The weights of chunks first + chunk of a unit, fp32 [chunks, 8].

    low, top: where the unit's planes lie. first: a multiple of 16, so of the chunks of a tile.
    """
    scale = tl.load(scale, inside)
    zero = tl.load(zero, inside)
    if NBITS == 3:
        tiles = _tiles(low + first * 2, chunk, inside, 2)
        top_tiles = _tiles(top + first, chunk, inside, 1)
        even, odd, unit = _fields(tiles, chunk, 2)
        top_even, top_odd, top_unit = _fields(top_tiles, chunk, 1)
        top_unit *= 4
        rest = -8388608.0 * (unit + top_unit)
        even = tl.fma(even, unit, tl.fma(top_even, top_unit, rest))
        odd = tl.fma(odd, unit, tl.fma(top_odd, top_unit, rest))
    else:
        even, odd, unit = _fields(_tiles(low + first * NBITS, chunk, inside, NBITS), chunk, NBITS)
        even = tl.fma(even, unit, -8388608.0 * unit)
        odd = tl.fma(odd, unit, -8388608.0 * unit)
    zero, scale = zero.to(tl.float32)[:, None], scale.to(tl.float32)[:, None]
    return tl.reshape(tl.join((even - zero) * scale, (odd - zero) * scale), chunk.shape[0], 8)


@triton.jit
def _tiles(plane, chunk, inside, WIDTH: tl.constexpr):
    """The tile that each chunk lies in, as words [chunks, 4]. Neighbours share one: it is read
    from memory once, and each thread can store what it loads without asking another."""
    plane = plane.to(tl.pointer_type(tl.uint32))
    at = (chunk // (16 // WIDTH) * 4)[:, None] + tl.arange(0, 4)[None, :]
    return tl.load(plane + at, inside[:, None], other=0)


@triton.jit
def _fields(tiles, chunk, WIDTH: tl.constexpr):
    """Each chunk's even and odd codes as 2**23 + code * 2**shift, and 2**-shift: fp32 [chunks, 4].

    ORed into the mantissa of 2**23 a code is a float after one instruction, without shifting it.
    """
    shift = (chunk % (16 // WIDTH) * WIDTH)[:, None]
    mask = (((1 << WIDTH) - 1) << shift).to(tl.uint32)
    even = ((tiles & mask) | 0x4B000000).to(tl.float32, bitcast=True)
    odd = (((tiles >> 16) & mask) | 0x4B000000).to(tl.float32, bitcast=True)
    return even, odd, ((127 - shift) << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["units", "stride"])
def _anywhere(
    W_q, scale, zero, out, units, stride,
    IN: tl.constexpr, NBITS: tl.constexpr, GROUP: tl.constexpr, ROW_BYTES: tl.constexpr,
    TOP: tl.constexpr, STEP: tl.constexpr, AXIS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Groups that cut chunks: every weight finds its code, scale and zero on its own."""
    blocks: tl.constexpr = (IN + COLUMNS - 1) // COLUMNS
    row = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < units * (1 if AXIS == 1 else GROUP)) & (column < IN)
    unit, code = row, column
    if AXIS == 0:
        unit, code = row % units, column.to(tl.int64) * GROUP + row // units
    packed = W_q.to(tl.pointer_type(tl.uint8)) + unit * ROW_BYTES
    if NBITS == 3:
        W = _code(packed, code, inside, 2) + 4 * _code(packed + TOP, code, inside, 1)
    else:
        W = _code(packed, code, inside, NBITS)
    group = unit * (IN if AXIS == 0 else IN // GROUP) + code // GROUP
    W = W.to(tl.float32) - tl.load(zero + group, inside).to(tl.float32)
    W *= tl.load(scale + group, inside).to(tl.float32)
    tl.store(out + row * stride * STEP + column, W.to(out.dtype.element_ty), inside)


@triton.jit
def _code(plane, code, inside, WIDTH: tl.constexpr):
    """Codes by their number in the unit, int32."""
    chunk = code // 8
    halfword = chunk // (16 // WIDTH) * 8 + code % 8
    found = tl.load(plane.to(tl.pointer_type(tl.uint16)) + halfword, inside, other=0).to(tl.int32)
    return (found >> (chunk % (16 // WIDTH) * WIDTH).to(tl.int32)) & ((1 << WIDTH) - 1)
