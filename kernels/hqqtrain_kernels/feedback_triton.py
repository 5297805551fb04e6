"""Quantize columns one after the other, and add the error of each to the columns behind it.

The rows are independent, but a column needs the errors of all columns before it. PyTorch launches
about ten kernels for a column, which take 138 us on an H200 whatever the number of rows. This
kernel keeps 64 columns of some rows in registers and goes through them in a loop.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from hqqtrain_kernels.launcher_triton import CachedKernel
from hqqtrain_kernels.solve_triton import MAGIC, MAGIC_BITS, clamp

BLOCK_ROWS = 32
"""Rows of a program. With one warp, each thread has a row, and no sum crosses threads."""

MAX_COLUMNS = 64
"""Most columns in the registers of a program."""

_kernels: dict[tuple[int, int], CachedKernel] = {}


def quantize_columns(
    W: Tensor,
    scale: Tensor,
    zero: Tensor,
    feedback: Tensor,
    codes: Tensor,
    errors: Tensor,
    *,
    nbits: int,
    group_columns: int,
) -> None:
    """Quantize the first columns of W, which are as many as `codes` has.

    `hqqtrain/quant/calibrated/columns.py` has the same in PyTorch, and explains the arguments. Here
    W, scale, zero, codes, errors and the rows of `feedback` are contiguous, and W has at most
    MAX_COLUMNS columns.
    """
    columns, count, rows = len(W), len(codes), W[0].numel()
    assert count <= columns <= MAX_COLUMNS
    assert W.numel() < 1 << 31  # offsets are int32
    key = (nbits, group_columns)
    if key not in _kernels:
        constants: dict[str, Any] = {
            "NBITS": nbits,
            "GROUP_COLUMNS": group_columns,
            "COLUMNS": MAX_COLUMNS,
            "BLOCK_ROWS": BLOCK_ROWS,
        }
        _kernels[key] = CachedKernel(
            quantize_columns_kernel, constants, num_warps=1, num_stages=1, enable_fp_fusion=False
        )
    _kernels[key].launch(
        grid=(triton.cdiv(rows, BLOCK_ROWS), 1, 1),
        tensors={
            "W_ptr": W,
            "scale_ptr": scale,
            "zero_ptr": zero,
            "feedback_ptr": feedback,
            "codes_ptr": codes,
            "errors_ptr": errors,
        },
        integers={
            "rows": rows,
            "units": W.shape[2],
            "columns": columns,
            "count": count,
            "feedback_stride": feedback.stride(0),
        },
    )


@triton.jit(do_not_specialize=["rows", "units", "columns", "count", "feedback_stride"])
def quantize_columns_kernel(
    W_ptr,
    scale_ptr,
    zero_ptr,
    feedback_ptr,
    codes_ptr,
    errors_ptr,
    rows,
    units,
    columns,
    count,
    feedback_stride,
    NBITS: tl.constexpr,
    GROUP_COLUMNS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Quantize `count` columns of BLOCK_ROWS rows. `quantize_columns` explains the arguments."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, COLUMNS)
    exists = row < rows
    offset = column[:, None] * rows + row[None, :]
    W = tl.load(W_ptr + offset, (column < columns)[:, None] & exists[None, :], 0.0)
    for j in range(count):
        # 1. The nearest codes of column j. Adding MAGIC rounds, half to even.
        w = tl.sum(tl.where(column[:, None] == j, W, 0.0), 0)
        meta = (j // GROUP_COLUMNS) * units + row % units
        scale = tl.load(scale_ptr + meta, exists, 1.0).to(tl.float32)
        zero = tl.load(zero_ptr + meta, exists, 0.0).to(tl.float32)
        place = clamp(tl.div_rn(w, scale) + zero, 0.0, (1 << NBITS) - 1.0)
        code = (place + MAGIC).to(tl.int32, bitcast=True) - MAGIC_BITS
        error = w - (code.to(tl.float32) - zero) * scale
        place_of_j = j * rows + row
        tl.store(codes_ptr + place_of_j, code.to(tl.uint8), exists)
        tl.store(errors_ptr + place_of_j, error, exists)
        # 2. Its error changes the later columns. The feedback of all others is 0.
        share = tl.load(feedback_ptr + j * feedback_stride + column, column < columns, 0.0)
        W = tl.fma(share[:, None], error[None, :], W)
    is_later = (column >= count) & (column < columns)
    tl.store(W_ptr + offset, W, is_later[:, None] & exists[None, :])
