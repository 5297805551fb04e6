"""The blocks that the linear kernels load: the packed weight, scale and zero, and x.

The layers have axis 1, so a row of the weight is a unit of the packed layout. A step of a kernel
covers K_SLICES adjacent slices of every row, of BLOCK_K codes each. The slices are distributed over
the warps of a program ("sliced K"), just as splits of K are distributed over programs ("split-K").
One `tl.dot` takes DOT_K codes of a slice, which belong to one group. If EVEN_K, every step ends
within the row, so no load needs a mask.
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

    They are loaded in runs of 32 bytes. The runs of different rows then lie next to each other in
    shared memory, from which 8 rows are read at once. Whole rows would lie in the same banks, so
    that 8 reads would be needed instead of 1.

    Args:
        row_ptrs: Pointers [rows] to the first word (int32) of every row.
        step: Number of the step along K.
        end: Words of a row in this plane. Words from there on are zero in the result.
        WIDTH: Bits of a code in this plane.
        BLOCK_K: Codes of a slice.
        K_SLICES: Slices of a step.
        EVEN_K: Whether every step ends within the row.

    Returns:
        [K_SLICES * rows, words of BLOCK_K codes] int32.
    """
    SLICE_WORDS: tl.constexpr = BLOCK_K * WIDTH // 32
    STEP_WORDS: tl.constexpr = K_SLICES * SLICE_WORDS
    RUN_WORDS: tl.constexpr = 8 if STEP_WORDS >= 8 else STEP_WORDS
    # Number of the word in its row, as a block [runs, 1, RUN_WORDS].
    run_start = tl.arange(0, STEP_WORDS // RUN_WORDS)[:, None, None] * RUN_WORDS
    word = step * STEP_WORDS + run_start + tl.arange(0, RUN_WORDS)[None, None, :]
    if EVEN_K:
        words = tl.load(row_ptrs[None, :, None] + word)
    else:
        words = tl.load(row_ptrs[None, :, None] + word, mask=word < end, other=0)
    # [runs, rows, RUN_WORDS] -> [rows, slices, SLICE_WORDS] -> [slices * rows, SLICE_WORDS].
    words = tl.permute(words, (1, 0, 2))
    words = tl.reshape(words, (row_ptrs.shape[0], K_SLICES, SLICE_WORDS))
    words = tl.permute(words, (1, 0, 2))
    return tl.reshape(words, (K_SLICES * row_ptrs.shape[0], SLICE_WORDS))


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
    """Load scale or zero for the groups of a step. Both have the same shape, so one name serves.

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
    SLICE_GROUPS: tl.constexpr = BLOCK_K // GROUP_SIZE if GROUP_SIZE < BLOCK_K else 1
    group = step * (K_SLICES * SLICE_GROUPS) + tl.arange(0, K_SLICES * SLICE_GROUPS)[None, :]
    if GROUP_SIZE > BLOCK_K:
        # So far `group` numbers slices, GROUP_SIZE / BLOCK_K of which share a group.
        group = group // (GROUP_SIZE // BLOCK_K)
    if EVEN_K:
        scale = tl.load(row_ptrs[:, None] + group)
    else:
        scale = tl.load(row_ptrs[:, None] + group, mask=group < groups, other=0.0)
    # [rows, slices * SLICE_GROUPS] -> [slices * rows, SLICE_GROUPS, 1].
    scale = tl.reshape(scale, (row_ptrs.shape[0], K_SLICES, SLICE_GROUPS))
    scale = tl.permute(scale, (1, 0, 2))
    return tl.reshape(scale, (K_SLICES * row_ptrs.shape[0], SLICE_GROUPS, 1))


@triton.jit
def load_x(
    x_ptr,
    x_stride,
    m,
    M,
    K,
    step,
    dot_index,
    DOT_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    K_SLICES: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Load the x that one `tl.dot` takes, DOT_K elements of every slice of a step, transposed.

    Args:
        x_ptr: x [M, K].
        x_stride: Elements between the rows of x.
        m: Numbers [BLOCK_M] of the rows to load. Rows from M on are zero.
        M: Rows of x.
        K: Elements of a row.
        step: Number of the step along K.
        dot_index: Number of the `tl.dot` within the slice.
        DOT_K: Elements that one `tl.dot` takes from a slice.
        BLOCK_K: Elements of a slice.
        K_SLICES: Slices of a step.
        EVEN_K: Whether every step ends within the row.

    Returns:
        [K_SLICES, DOT_K, BLOCK_M]. For a single slice it is [DOT_K, BLOCK_M], loaded as a 2-D
        block: Hopper's tensor cores (wgmma) cannot read a 2-D view of a 3-D block.
    """
    # Offsets of rows and of k, in the order of the result: slices, then k, then rows.
    row = m.to(tl.int64) * x_stride
    k = step * (K_SLICES * BLOCK_K) + dot_index * DOT_K + tl.arange(0, DOT_K)
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
