"""Packed codes to dense weights on a GPU, at nearly the speed of copying as many bytes.

A training step dequantizes every weight twice, so dequantizing may cost no more than its memory
traffic. Codes, scale and zero are read once, 16 bytes at a time, and the weights are written 16
bytes at a time. The arithmetic, 10 to 13 instructions a weight, takes less time than this traffic
and runs at the same time.

The results have the bits of `reference.dequantize`. Codes become fp32 without rounding, and
(code - zero) * scale is evaluated in fp32, as in the reference, and then rounded to the dtype of
the result.

Three kernels share the work: `_dequantize_rows_kernel` (axis 1) and `_dequantize_columns_kernel`
(axis 0) for groups of whole chunks, and `dequantize_any_kernel` for all other group sizes. A chunk
is 8 adjacent codes of a unit; `dequantize_chunks_triton` explains this and the other words of the
packed layout.

On an H200, for outputs of 32 MB and more and groups of 64, axis 1 reaches 88 to 97 % of the
bandwidth of a copy of as many bytes. Axis 0 reaches 86 to 94 %, and 71 to 74 % at 3 bits: it writes
rows in pieces of 256 bytes, which alone is 5 % slower than writing whole rows.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqqtrain_kernels.dequantize_any_triton import dequantize_any_kernel
from hqqtrain_kernels.dequantize_chunks_triton import dequantize_chunks
from hqqtrain_kernels.launcher_triton import CachedKernel
from hqqtrain_kernels.layout import Layout, packed_bytes

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def dequantize(W_q: Tensor, scale: Tensor, zero: Tensor, layout: Layout, out: Tensor) -> None:
    """Write (code - zero) * scale to `out`: computed in fp32, then rounded to the dtype of `out`.

    Args:
        W_q: Packed codes [units, unit_bytes], uint8 or the same bits viewed as a float. Contiguous.
        scale: [units, groups], bf16, fp16 or fp32. Contiguous.
        zero: [units, groups], bf16, fp16 or fp32. Contiguous.
        layout: How the weight is packed.
        out: bf16, fp16 or fp32 [out_features, in_features]. The elements of a row must be adjacent;
            rows may have any stride, so `out` may be part of a larger buffer.

    Raises:
        ValueError: A shape, stride or dtype differs.
    """
    _check(W_q, scale, zero, layout, out)
    # The kernels' integers are not specialized, so the compiler does not know whether 8 divides the
    # stride. The kernels receive the quotient and multiply it by the constant divisor: this way the
    # compiler sees that rows are aligned, and stores 16 bytes at a time.
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
        and W_q.nbytes == units * layout.unit_bytes
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
            f"{layout} needs W_q of {units} x {layout.unit_bytes} bytes, scale and zero "
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
        "UNIT_BYTES": layout.unit_bytes,
        "HIGH_PLANE_OFFSET": packed_bytes(layout.unit_codes, 2),
        "STRIDE_DIVISOR": stride_divisor,
    }
    program_chunks, num_warps = _program_size(layout)
    if g % 8:
        kernel = dequantize_any_kernel
        constants |= {"AXIS": layout.axis, "BLOCK_ROWS": 8, "BLOCK_COLUMNS": 128}
        programs = triton.cdiv(rows, 8) * triton.cdiv(columns, 128)
    elif layout.axis == 1:
        kernel = _dequantize_rows_kernel
        constants |= {"BLOCK_CHUNKS": program_chunks}
        programs = rows * triton.cdiv(columns, 8 * program_chunks)
    else:
        # The chunks of a program form a block [BLOCK_COLUMNS, BLOCK_CHUNKS]. It takes as many
        # chunks of a group as there are, while at least 128 columns are left: a row of the block is
        # then written in pieces of at least 256 bytes (bf16).
        block_chunks = min(program_chunks // 128, triton.next_power_of_2(g // 8))
        block_columns = program_chunks // block_chunks
        kernel = _dequantize_columns_kernel
        constants |= {"BLOCK_COLUMNS": block_columns, "BLOCK_CHUNKS": block_chunks}
        column_blocks = triton.cdiv(columns, block_columns)
        programs = layout.units * column_blocks * triton.cdiv(g, 8 * block_chunks)
    return _Plan(kernel=CachedKernel(kernel, constants, num_warps=num_warps), programs=programs)


def _program_size(layout: Layout) -> tuple[int, int]:
    """Return the chunks and the warps of a program: the fastest on an H200 of those measured.

    A thread gets 2 chunks on axis 1 and 4 on axis 0, and at 3 bits twice as many: with fewer
    chunks, it would wait for the loads of one plane after the other.
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
    UNIT_BYTES: tl.constexpr,
    HIGH_PLANE_OFFSET: tl.constexpr,
    STRIDE_DIVISOR: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    """Axis 1, groups of whole chunks: a program writes up to BLOCK_CHUNKS chunks of a row.

    Args:
        W_q_ptr: Packed codes, [units, UNIT_BYTES] bytes.
        scale_ptr: [units, groups of a unit]; so is zero_ptr.
        zero_ptr: [units, groups of a unit].
        out_ptr: The weight [out_features, IN_FEATURES].
        units: Units of the weight.
        out_stride: Elements between the rows of `out`, divided by STRIDE_DIVISOR.
        IN_FEATURES: Columns of the weight.
        NBITS: Bits of a code.
        GROUP_SIZE: Codes of a group.
        UNIT_BYTES: Bytes of a packed unit.
        HIGH_PLANE_OFFSET: Bytes of a unit before its high plane; used for 3 bits only.
        STRIDE_DIVISOR: See `dequantize`.
        BLOCK_CHUNKS: Chunks of a program.
    """
    row_blocks: tl.constexpr = (IN_FEATURES // 8 + BLOCK_CHUNKS - 1) // BLOCK_CHUNKS
    # 1. Program -> its row, and its first chunk there. A row is a unit: both have the same number.
    row = (tl.program_id(0) // row_blocks).to(tl.int64)
    first_chunk = tl.program_id(0) % row_blocks * BLOCK_CHUNKS
    # 2. Number the chunks of the block from 0, and dequantize those within the row.
    chunk = tl.arange(0, BLOCK_CHUNKS)
    mask = chunk < IN_FEATURES // 8 - first_chunk
    group = row * (IN_FEATURES // GROUP_SIZE) + (first_chunk + chunk) // (GROUP_SIZE // 8)
    unit_ptr = W_q_ptr.to(tl.pointer_type(tl.uint8)) + row * UNIT_BYTES
    W = dequantize_chunks(
        low_ptr=unit_ptr,
        high_ptr=unit_ptr + HIGH_PLANE_OFFSET,
        first_chunk=first_chunk,
        chunk=chunk,
        mask=mask,
        scale_ptr=scale_ptr + group,
        zero_ptr=zero_ptr + group,
        NBITS=NBITS,
    )
    # 3. Each thread stores its chunks whole: 16 bytes of bf16, adjacent to those of its neighbors.
    out_ptr += row * out_stride * STRIDE_DIVISOR + first_chunk * 8
    offset = chunk[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(out_ptr + offset, W.to(out_ptr.dtype.element_ty), mask[:, None])


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
    UNIT_BYTES: tl.constexpr,
    HIGH_PLANE_OFFSET: tl.constexpr,
    STRIDE_DIVISOR: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    """Axis 0, groups of whole chunks: a program writes a block of weights, BLOCK_COLUMNS wide.

    A unit is a row class. It has one group per column: GROUP_SIZE // 8 chunks, whose codes are
    adjacent in W_q, while their weights are `units` rows apart in `out`. The block is therefore
    dequantized as [columns, codes], and transposed before it is stored.

    The arguments are those of `_dequantize_rows_kernel`, except for two:

    Args:
        BLOCK_COLUMNS: Columns of a program.
        BLOCK_CHUNKS: Chunks of each column.
    """
    column_blocks: tl.constexpr = (IN_FEATURES + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    chunk_blocks: tl.constexpr = (GROUP_SIZE // 8 + BLOCK_CHUNKS - 1) // BLOCK_CHUNKS
    # 1. Program -> its unit, its first column, and its first chunk in the group of every column.
    first_chunk = tl.program_id(0) % chunk_blocks * BLOCK_CHUNKS
    first_column = tl.program_id(0) // chunk_blocks % column_blocks * BLOCK_COLUMNS
    unit = (tl.program_id(0) // (chunk_blocks * column_blocks)).to(tl.int64)
    # 2. Load and dequantize the block as [BLOCK_COLUMNS * BLOCK_CHUNKS, 8]. The chunks of a column
    #    are side by side. Columns are numbered from first_column, chunks within their group.
    i = tl.arange(0, BLOCK_COLUMNS * BLOCK_CHUNKS)
    column, chunk = i // BLOCK_CHUNKS, first_chunk + i % BLOCK_CHUNKS
    chunk_mask = (column < IN_FEATURES - first_column) & (chunk < GROUP_SIZE // 8)
    group = unit * IN_FEATURES + first_column + column
    unit_ptr = W_q_ptr.to(tl.pointer_type(tl.uint8)) + unit * UNIT_BYTES
    W = dequantize_chunks(
        low_ptr=unit_ptr,
        high_ptr=unit_ptr + HIGH_PLANE_OFFSET,
        first_chunk=first_column.to(tl.int64) * (GROUP_SIZE // 8),
        chunk=column * (GROUP_SIZE // 8) + chunk,
        mask=chunk_mask,
        scale_ptr=scale_ptr + group,
        zero_ptr=zero_ptr + group,
        NBITS=NBITS,
    )
    # 3. Transpose to [BLOCK_CHUNKS * 8, BLOCK_COLUMNS], and store it row by row. Code j of a group
    #    is a weight of the unit's row j, which is row unit + j * units of the whole weight.
    W = tl.reshape(W.to(out_ptr.dtype.element_ty), BLOCK_COLUMNS, BLOCK_CHUNKS * 8).T
    row = first_chunk * 8 + tl.arange(0, BLOCK_CHUNKS * 8)
    column = tl.arange(0, BLOCK_COLUMNS)
    row_stride = units.to(tl.int64) * out_stride * STRIDE_DIVISOR
    out_ptr += unit * out_stride * STRIDE_DIVISOR + first_column
    mask = (row < GROUP_SIZE)[:, None] & (column < IN_FEATURES - first_column)[None, :]
    tl.store(out_ptr + (row * row_stride)[:, None] + column[None, :], W, mask)
