"""Packed codes to dense weights on a GPU, at nearly the speed of copying as many bytes.

A training step dequantizes every weight twice, so this may cost no more than its memory traffic.
Codes, scale and zero are read once, 16 bytes at a time, and the weights are written 16 bytes at a
time. The arithmetic, 10 to 13 instructions a weight, hides behind that.

The bits are those of `reference.dequantize`: no step before (code - zero) * scale rounds.

Throughout, a chunk is 8 adjacent codes of a unit: 8 weights, which are 16 bytes in bf16. Three
kernels share the work: `_dequantize_rows_kernel` (axis 1) and `_dequantize_columns_kernel` (axis 0)
for groups of whole chunks, and `dequantize_any_kernel` for all other group sizes.

On an H200, for outputs of 32 MB and more and groups of 64, as shares of the bandwidth of a copy of
as many bytes: axis 1 reaches 88 to 97 %; axis 0 reaches 86 to 94 % (writing alone, in its 256-byte
pieces of rows, is 5 % slower than writing whole rows), but 71 to 74 % at 3 bits.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqqtrain_kernels.dequantize_any_triton import dequantize_any_kernel
from hqqtrain_kernels.launcher_triton import CachedKernel
from hqqtrain_kernels.layout import Layout, packed_bytes

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def dequantize(W_q: Tensor, scale: Tensor, zero: Tensor, layout: Layout, out: Tensor) -> None:
    """Write (W_q - zero) * scale to `out`: computed in fp32, rounded once.

    Args:
        W_q: Packed codes [units, row_bytes], uint8 or the same bits viewed as a float. Contiguous.
        scale: [units, groups], bf16, fp16 or fp32. Contiguous.
        zero: [units, groups], bf16, fp16 or fp32. Contiguous.
        layout: How the weight is packed.
        out: bf16, fp16 or fp32 [out_features, in_features]. The elements of a row must be adjacent;
            rows may have any stride, so `out` may be part of a larger buffer.

    Raises:
        ValueError: A shape, stride or dtype differs.
    """
    _check(W_q, scale, zero, layout, out)
    stride = out.stride(0)
    stride_divisor = 8 if stride % 8 == 0 else 1
    plan = _plan(layout, stride_divisor)
    plan.kernel.launch(
        grid=(plan.programs, 1, 1),
        tensors={"W_q_ptr": W_q, "scale_ptr": scale, "zero_ptr": zero, "out_ptr": out},
        integers={"units": layout.units, "out_stride": stride // stride_divisor},
    )


def _check(W_q: Tensor, scale: Tensor, zero: Tensor, layout: Layout, out: Tensor) -> None:
    units, dense_shape = layout.units, (layout.out_features, layout.in_features)
    if not (
        W_q.shape[0] == units
        and W_q.nbytes == units * layout.row_bytes
        and scale.shape == zero.shape == (units, layout.groups)
        and scale.dtype in DTYPES
        and zero.dtype in DTYPES
        and out.shape == dense_shape
        and out.dtype in DTYPES
        and (out.stride(1) == 1 or dense_shape[1] == 1)
        and W_q.is_contiguous()
        and scale.is_contiguous()
        and zero.is_contiguous()
    ):
        given = "; ".join(
            f"{list(t.shape)} {t.dtype}, strides {t.stride()}" for t in (W_q, scale, zero, out)
        )
        raise ValueError(
            f"{layout} needs W_q of {units} x {layout.row_bytes} bytes, scale and zero "
            f"{[units, layout.groups]}, contiguous, and out {list(dense_shape)} with contiguous "
            f"rows, all but W_q bf16, fp16 or fp32; not {given}"
        )


class _Plan(NamedTuple):
    kernel: CachedKernel
    programs: int


@functools.cache
def _plan(layout: Layout, stride_divisor: int) -> _Plan:
    """Choose the kernel, its block sizes and the number of its programs."""
    rows, columns, g = layout.out_features, layout.in_features, layout.group_size
    constants: dict[str, Any] = {
        "IN_FEATURES": columns,
        "NBITS": layout.nbits,
        "GROUP_SIZE": g,
        "ROW_BYTES": layout.row_bytes,
        "HIGH_PLANE": packed_bytes(layout.row_codes, 2),
        "STRIDE_DIVISOR": stride_divisor,
    }
    chunks, num_warps = _block(layout)
    if g % 8:
        kernel = dequantize_any_kernel
        constants |= {"AXIS": layout.axis, "BLOCK_ROWS": 8, "BLOCK_COLUMNS": 128}
        programs = -(-rows // 8) * -(-columns // 128)
    elif layout.axis == 1:
        kernel = _dequantize_rows_kernel
        constants |= {"BLOCK_CHUNKS": chunks}
        programs = rows * -(-columns // (8 * chunks))
    else:
        # A block of columns by chunks: as long a piece of a column as its group has, but at least
        # 128 columns wide.
        depth = min(chunks // 128, triton.next_power_of_2(g // 8))
        width = chunks // depth
        kernel = _dequantize_columns_kernel
        constants |= {"BLOCK_COLUMNS": width, "BLOCK_CHUNKS": depth}
        programs = layout.units * -(-columns // width) * -(-g // (8 * depth))
    return _Plan(kernel=CachedKernel(kernel, constants, num_warps=num_warps), programs=programs)


def _block(layout: Layout) -> tuple[int, int]:
    """Return chunks and warps of a program: the fastest on an H200 of those measured.

    With 3 bits a thread needs twice as many chunks, or it waits for one plane after the other.
    """
    is_3_bit = layout.nbits == 3
    if layout.axis == 1:
        return 256, 2 if is_3_bit else 4
    return 1024 if is_3_bit else 512, 4


@triton.jit(do_not_specialize=["units", "out_stride"])
def _dequantize_rows_kernel(
    W_q_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    units,
    out_stride,
    IN_FEATURES: tl.constexpr,
    NBITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    HIGH_PLANE: tl.constexpr,
    STRIDE_DIVISOR: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    """Axis 1, groups of whole chunks: a program writes up to BLOCK_CHUNKS chunks of a row."""
    blocks: tl.constexpr = (IN_FEATURES // 8 + BLOCK_CHUNKS - 1) // BLOCK_CHUNKS
    # Program -> (row, first chunk). A row is a unit, so its number is that of its packed bytes too.
    row = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCK_CHUNKS
    chunk = tl.arange(0, BLOCK_CHUNKS)
    mask = chunk < IN_FEATURES // 8 - first
    group = row * (IN_FEATURES // GROUP_SIZE) + (first + chunk) // (GROUP_SIZE // 8)
    unit_ptr = W_q_ptr.to(tl.pointer_type(tl.uint8)) + row * ROW_BYTES
    W = _dequantize_chunks(
        low_ptr=unit_ptr,
        high_ptr=unit_ptr + HIGH_PLANE,
        first=first,
        chunk=chunk,
        mask=mask,
        scale_ptr=scale_ptr + group,
        zero_ptr=zero_ptr + group,
        NBITS=NBITS,
    )
    # Each thread stores its chunks whole: 16 bytes of bf16, adjacent to those of its neighbors.
    out_ptr += row * out_stride * STRIDE_DIVISOR + first * 8
    at = chunk[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(out_ptr + at, W.to(out_ptr.dtype.element_ty), mask[:, None])


@triton.jit(do_not_specialize=["units", "out_stride"])
def _dequantize_columns_kernel(
    W_q_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    units,
    out_stride,
    IN_FEATURES: tl.constexpr,
    NBITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    HIGH_PLANE: tl.constexpr,
    STRIDE_DIVISOR: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    """Axis 0, groups of whole chunks: a program writes a block of columns by chunks.

    The codes of a column are adjacent, while its weights are `units` rows apart: the block is
    transposed before it is stored.
    """
    blocks: tl.constexpr = (IN_FEATURES + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    depths: tl.constexpr = (GROUP_SIZE // 8 + BLOCK_CHUNKS - 1) // BLOCK_CHUNKS
    # Program -> (unit, block of columns, depth: block of chunks within their groups).
    depth = tl.program_id(0) % depths * BLOCK_CHUNKS
    first = tl.program_id(0) // depths % blocks * BLOCK_COLUMNS
    unit = (tl.program_id(0) // (depths * blocks)).to(tl.int64)
    # Load and dequantize [BLOCK_COLUMNS * BLOCK_CHUNKS, 8], the chunks of a column side by side.
    i = tl.arange(0, BLOCK_COLUMNS * BLOCK_CHUNKS)
    column, chunk = i // BLOCK_CHUNKS, depth + i % BLOCK_CHUNKS
    mask = (column < IN_FEATURES - first) & (chunk < GROUP_SIZE // 8)
    group = unit * IN_FEATURES + first + column
    unit_ptr = W_q_ptr.to(tl.pointer_type(tl.uint8)) + unit * ROW_BYTES
    W = _dequantize_chunks(
        low_ptr=unit_ptr,
        high_ptr=unit_ptr + HIGH_PLANE,
        first=first.to(tl.int64) * (GROUP_SIZE // 8),
        chunk=column * (GROUP_SIZE // 8) + chunk,
        mask=mask,
        scale_ptr=scale_ptr + group,
        zero_ptr=zero_ptr + group,
        NBITS=NBITS,
    )
    # Transpose, and store rows of BLOCK_COLUMNS weights.
    W = tl.reshape(W.to(out_ptr.dtype.element_ty), BLOCK_COLUMNS, BLOCK_CHUNKS * 8).T
    row = depth * 8 + tl.arange(0, BLOCK_CHUNKS * 8)
    column = tl.arange(0, BLOCK_COLUMNS)
    row_stride = units.to(tl.int64) * out_stride * STRIDE_DIVISOR
    out_ptr += unit * out_stride * STRIDE_DIVISOR + first
    mask = (row < GROUP_SIZE)[:, None] & (column < IN_FEATURES - first)[None, :]
    tl.store(out_ptr + (row * row_stride)[:, None] + column[None, :], W, mask)


@triton.jit
def _dequantize_chunks(
    low_ptr, high_ptr, first, chunk, mask, scale_ptr, zero_ptr, NBITS: tl.constexpr
):
    """Return the weights of chunks first + chunk of a unit, fp32 [chunks, 8].

    Args:
        low_ptr: The unit's plane, or for 3 bits its 2-bit plane.
        high_ptr: For 3 bits, its plane of high bits.
        first: A multiple of 16, and hence of the chunks of a tile.
        chunk: [chunks].
        mask: [chunks].
        scale_ptr: Pointers [chunks] to the scale of every chunk; so is zero_ptr, to the zeros.
        zero_ptr: [chunks].
        NBITS: Bits of a code.
    """
    scale = tl.load(scale_ptr, mask)
    zero = tl.load(zero_ptr, mask)
    # `_fields` returns 2**23 + code * 2**shift, and 2**-shift. One fused multiply-add, exact,
    # leaves the code. For 3 bits a second one adds 4 times the high bit.
    if NBITS == 3:
        tiles = _load_tiles(plane_ptr=low_ptr + first * 2, chunk=chunk, mask=mask, WIDTH=2)
        high_tiles = _load_tiles(plane_ptr=high_ptr + first, chunk=chunk, mask=mask, WIDTH=1)
        even, odd, unshift = _fields(tiles=tiles, chunk=chunk, WIDTH=2)
        high_even, high_odd, high_unshift = _fields(tiles=high_tiles, chunk=chunk, WIDTH=1)
        high_unshift *= 4
        offset = -8388608.0 * (unshift + high_unshift)
        even = tl.fma(even, unshift, tl.fma(high_even, high_unshift, offset))
        odd = tl.fma(odd, unshift, tl.fma(high_odd, high_unshift, offset))
    else:
        tiles = _load_tiles(plane_ptr=low_ptr + first * NBITS, chunk=chunk, mask=mask, WIDTH=NBITS)
        even, odd, unshift = _fields(tiles=tiles, chunk=chunk, WIDTH=NBITS)
        even = tl.fma(even, unshift, -8388608.0 * unshift)
        odd = tl.fma(odd, unshift, -8388608.0 * unshift)
    zero, scale = zero.to(tl.float32)[:, None], scale.to(tl.float32)[:, None]
    return tl.reshape(tl.join((even - zero) * scale, (odd - zero) * scale), chunk.shape[0], 8)


@triton.jit
def _load_tiles(plane_ptr, chunk, mask, WIDTH: tl.constexpr):
    """Load the tile of each chunk as words [chunks, 4].

    Neighboring chunks share a tile. It is read from memory once, and each thread can store what it
    loads without a shuffle.
    """
    plane_ptr = plane_ptr.to(tl.pointer_type(tl.uint32))
    at = (chunk // (16 // WIDTH) * 4)[:, None] + tl.arange(0, 4)[None, :]
    return tl.load(plane_ptr + at, mask[:, None], other=0)


@triton.jit
def _fields(tiles, chunk, WIDTH: tl.constexpr):
    """Return even and odd codes of each chunk as 2**23 + code * 2**shift, and 2**-shift.

    All are fp32: [chunks, 4], [chunks, 4] and [chunks, 1]. ORed into the mantissa of 2**23, a code
    is a float after one instruction, without a shift.
    """
    shift = (chunk % (16 // WIDTH) * WIDTH)[:, None]
    mask = (((1 << WIDTH) - 1) << shift).to(tl.uint32)
    even = ((tiles & mask) | 0x4B000000).to(tl.float32, bitcast=True)
    odd = (((tiles >> 16) & mask) | 0x4B000000).to(tl.float32, bitcast=True)
    return even, odd, ((127 - shift) << 23).to(tl.float32, bitcast=True)
