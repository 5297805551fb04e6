"""The dequantizing kernel for any group size, also for groups that are not whole chunks of 8 codes.

Chunks do not align with groups here, so every weight looks up its own code, scale and zero.
`layout` explains unit, chunk, plane and halfword.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["units", "out_stride"])
def dequantize_any_kernel(
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
    AXIS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Dequantize a block [BLOCK_ROWS, BLOCK_COLUMNS] of the weight, for any group size.

    `dequantize_triton` explains the other arguments.
    """
    # 1. Program -> rows and columns of its block. Addresses are int64: a weight may be large.
    column_blocks: tl.constexpr = (IN_FEATURES + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    first_row = tl.program_id(0) // column_blocks * BLOCK_ROWS
    row = first_row + tl.arange(0, BLOCK_ROWS)[:, None].to(tl.int64)
    first_column = tl.program_id(0) % column_blocks * BLOCK_COLUMNS
    column = first_column + tl.arange(0, BLOCK_COLUMNS)[None, :]
    mask = (row < units * (1 if AXIS == 1 else GROUP_SIZE)) & (column < IN_FEATURES)
    # 2. Weight -> its unit, and the number of its code there. For axis 0 the rows of a group are
    #    `units` apart in the weight, and the codes of a column are adjacent in the unit.
    unit, code = row, column
    if AXIS == 0:
        unit, code = row % units, column.to(tl.int64) * GROUP_SIZE + row // units
    # 3. Load every code with its scale and zero, and compute (code - zero) * scale in fp32.
    unit_ptr = W_q_ptr.to(tl.pointer_type(tl.uint8)) + unit * UNIT_BYTES
    if NBITS == 3:
        W = _load_code(plane_ptr=unit_ptr, code=code, mask=mask, WIDTH=2)
        W += 4 * _load_code(plane_ptr=unit_ptr + HIGH_PLANE_OFFSET, code=code, mask=mask, WIDTH=1)
    else:
        W = _load_code(plane_ptr=unit_ptr, code=code, mask=mask, WIDTH=NBITS)
    group = unit * (IN_FEATURES if AXIS == 0 else IN_FEATURES // GROUP_SIZE) + code // GROUP_SIZE
    W = W.to(tl.float32) - tl.load(zero_ptr + group, mask).to(tl.float32)
    W *= tl.load(scale_ptr + group, mask).to(tl.float32)
    row_ptr = out_ptr + row * out_stride * STRIDE_DIVISOR
    tl.store(row_ptr + column, W.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _load_code(plane_ptr, code, mask, WIDTH: tl.constexpr):
    """Load codes by their number in the unit, as int32.

    A tile stores 16 / WIDTH chunks. Code c of chunk i of a tile is field i of the tile's halfword
    c.
    """
    chunk = code // 8
    halfword = chunk // (16 // WIDTH) * 8 + code % 8
    ptr = plane_ptr.to(tl.pointer_type(tl.uint16)) + halfword
    value = tl.load(ptr, mask, other=0).to(tl.int32)
    return (value >> (chunk % (16 // WIDTH) * WIDTH).to(tl.int32)) & ((1 << WIDTH) - 1)
