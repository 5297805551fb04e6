"""The blocks that the linear kernels load: the packed weight, scale and zero, and x.

A step of a kernel covers K_SLICES adjacent slices of BLOCK_K codes of every row. The slices are
split over the warps of a program ("sliced K"), as splits of K are over programs. EVEN_K: all steps
end within the row, so nothing needs a mask.
"""

import triton
import triton.language as tl


@triton.jit
def load_words(
    row_ptrs,
    step,
    end,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    K_SLICES: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Load the packed words of a step.

    They are loaded in runs of 32 bytes, which then lie close together in shared memory, where 8
    rows are read at once: whole rows would meet in the same banks (8 reads instead of 1).

    Args:
        row_ptrs: Pointers [rows] to the first word (int32) of every row.
        step: Number of the step along K.
        end: Words of a row. From there on the result is zero.
        WIDTH: Bits of a code in this plane.
        BLOCK_K: Codes of a slice.
        K_SLICES: Slices of a step.
        EVEN_K: Whether every step ends within the row.

    Returns:
        [K_SLICES * rows, words of BLOCK_K codes] int32.
    """
    COUNT: tl.constexpr = BLOCK_K * WIDTH // 32
    RUN: tl.constexpr = 8 if K_SLICES * COUNT >= 8 else K_SLICES * COUNT
    # Block of the load: [runs, rows, RUN].
    run = tl.arange(0, K_SLICES * COUNT // RUN)[:, None, None] * RUN
    at = step * (K_SLICES * COUNT) + run + tl.arange(0, RUN)[None, None, :]
    if EVEN_K:
        t = tl.load(row_ptrs[None, :, None] + at)
    else:
        t = tl.load(row_ptrs[None, :, None] + at, mask=at < end, other=0)
    # Join the runs of a row, then put the slices first.
    t = tl.reshape(tl.permute(t, (1, 0, 2)), (row_ptrs.shape[0], K_SLICES, COUNT))
    return tl.reshape(tl.permute(t, (1, 0, 2)), (K_SLICES * row_ptrs.shape[0], COUNT))


@triton.jit
def load_scales(
    row_ptrs,
    step,
    groups,
    GROUP_SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    K_SLICES: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Load scale or zero for the groups of a step.

    Args:
        row_ptrs: Pointers [rows] to the scale, or zero, of the first group of every row.
        step: Number of the step along K.
        groups: Groups of a row.
        GROUP_SIZE: Codes of a group, a multiple or a divisor of BLOCK_K.
        BLOCK_K: Codes of a slice.
        K_SLICES: Slices of a step.
        EVEN_K: Whether every step ends within the row.

    Returns:
        [K_SLICES * rows, groups of a slice, 1]. A slice within a larger group counts as one group.
    """
    COUNT: tl.constexpr = BLOCK_K // GROUP_SIZE if GROUP_SIZE < BLOCK_K else 1
    at = step * (K_SLICES * COUNT) + tl.arange(0, K_SLICES * COUNT)[None, :]
    if GROUP_SIZE > BLOCK_K:
        at = at // (GROUP_SIZE // BLOCK_K)
    if EVEN_K:
        t = tl.load(row_ptrs[:, None] + at)
    else:
        t = tl.load(row_ptrs[:, None] + at, mask=at < groups, other=0.0)
    t = tl.permute(tl.reshape(t, (row_ptrs.shape[0], K_SLICES, COUNT)), (1, 0, 2))
    return tl.reshape(t, (K_SLICES * row_ptrs.shape[0], COUNT, 1))


@triton.jit
def load_x(
    x_ptr,
    x_stride,
    m,
    M,
    K,
    step,
    chunk,
    CHUNK_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    K_SLICES: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Load one chunk of CHUNK_K elements of x from every slice of a step, transposed.

    Args:
        x_ptr: x [M, K].
        x_stride: Elements between the rows of x.
        m: Numbers [BLOCK_M] of the rows to load. Rows from M on are zero.
        M: Rows of x.
        K: Elements of a row.
        step: Number of the step along K.
        chunk: Number of the chunk within its slice.
        CHUNK_K: Elements of a chunk.
        BLOCK_K: Elements of a slice.
        K_SLICES: Slices of a step.
        EVEN_K: Whether every step ends within the row.

    Returns:
        [K_SLICES, CHUNK_K, BLOCK_M]; a single slice is [CHUNK_K, BLOCK_M]. That is a genuine 2-D
        block, not a view of a 3-D one, from which wgmma could not read.
    """
    # Offsets of rows and of k, in the order of the result: slices, then k, then rows.
    row = m.to(tl.int64) * x_stride
    k = step * (K_SLICES * BLOCK_K) + chunk * CHUNK_K + tl.arange(0, CHUNK_K)
    if K_SLICES > 1:
        k = k[None, :, None] + (tl.arange(0, K_SLICES) * BLOCK_K)[:, None, None]
        row = row[None, None, :]
        mask = (m < M)[None, None, :]
    else:
        k = k[:, None]
        row = row[None, :]
        mask = (m < M)[None, :]
    if not EVEN_K:
        mask = mask & (k < K)
    return tl.load(x_ptr + row + k, mask=mask, other=0.0)


@triton.jit
def dot(a, b, acc, UPCAST: tl.constexpr):
    """Return acc + a b. UPCAST multiplies in fp32, because the interpreter's bf16 is wrong."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")
