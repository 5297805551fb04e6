"""The operands of the skinny GEMM's products, and the sum over its slices of K.

The codes stay in the order in which unpacking leaves them in the registers, and x is brought into
that order.
"""

import triton
import triton.language as tl

from hqqtrain_kernels.loads_triton import dot, load_words, load_x
from hqqtrain_kernels.unpack_triton import codes_to_pairs, opaque_constant, pairs_to_halves


@triton.jit
def load_codes(
    row_ptrs,
    split,
    low_words,
    K,
    NBITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    K_SLICES: tl.constexpr,
    FIELDS_PER_SHIFT: tl.constexpr,
    ADJACENT_PAIRS: tl.constexpr,
    EVEN_K: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Load the codes of one split of rows as 16-bit floats: [K_SLICES * rows, BLOCK_K].

    `operand_format` says which floats. low_words is the number of words in the low plane of a row.
    """
    WIDTH: tl.constexpr = 2 if NBITS == 3 else NBITS
    ROWS: tl.constexpr = K_SLICES * row_ptrs.shape[0]
    low = load_words(
        row_ptrs=row_ptrs,
        step=split,
        end=low_words,
        WIDTH=WIDTH,
        BLOCK_K=BLOCK_K,
        K_SLICES=K_SLICES,
        EVEN_K=EVEN_K,
    )
    low = tl.reshape(low, (ROWS, BLOCK_K * WIDTH // 128, 4))  # tiles of 4 words
    pairs = codes_to_pairs(
        low,
        WIDTH=WIDTH,
        FIRST_BIT=0,
        FIELDS_PER_SHIFT=FIELDS_PER_SHIFT,
        ADJACENT_PAIRS=ADJACENT_PAIRS,
    )
    if tl.bfloat16 == DTYPE:
        pairs |= opaque_constant(0x43004300, ROWS)  # the exponent of 128, in both halfwords
    if NBITS == 3:
        # The high bit of a code goes to bit 2, above the two low ones.
        high_ptrs, high_words = row_ptrs + low_words, tl.cdiv(K, 128) * 4
        high = load_words(
            row_ptrs=high_ptrs,
            step=split,
            end=high_words,
            WIDTH=1,
            BLOCK_K=BLOCK_K,
            K_SLICES=K_SLICES,
            EVEN_K=EVEN_K,
        )
        high = tl.reshape(high, (ROWS, BLOCK_K // 128, 4))
        pairs |= codes_to_pairs(
            high,
            WIDTH=1,
            FIRST_BIT=2,
            FIELDS_PER_SHIFT=FIELDS_PER_SHIFT,
            ADJACENT_PAIRS=ADJACENT_PAIRS,
        )
    return pairs_to_halves(pairs, DTYPE)


@triton.jit
def load_operands(
    x_ptr,
    x_stride,
    M,
    K,
    split,
    NBITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    K_SLICES: tl.constexpr,
    GROUP_K: tl.constexpr,
    DOT_K: tl.constexpr,
    FIELDS_PER_SHIFT: tl.constexpr,
    CODE_OFFSET: tl.constexpr,
    ADJACENT_PAIRS: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Load one split of x, and prepare all that the products need of it.

    Returns:
        x_blocks: For every `tl.dot` of a slice, x [K_SLICES, DOT_K, BLOCK_M] in the order of the
            codes.
        x_sums: For every group of a slice, the sum of x, [K_SLICES, 1, BLOCK_M].
        offsets: For every group of a slice, what CODE_OFFSET adds to the sum of the group,
            [K_SLICES, 1, BLOCK_M]: CODE_OFFSET times the sum of x_blocks.

    The tensor cores compute the sums, as products with ones. The sums then have the same register
    layout as the products that they are used with, and need no conversion in each step.
    """
    x_blocks = ()
    x_sums = ()
    offsets = ()
    m = tl.arange(0, BLOCK_M)
    # 16 equal rows, the minimum of a tensor core product. Every row of the result is the sum; the
    # maximum below picks one.
    ones = tl.full((K_SLICES, 16, DOT_K), 1.0, x_ptr.dtype.element_ty)
    for g in tl.static_range(BLOCK_K // GROUP_K):
        x_sum = tl.zeros((K_SLICES, 16, BLOCK_M), tl.float32)
        scaled_sum = x_sum
        for j in tl.static_range(g * (GROUP_K // DOT_K), (g + 1) * (GROUP_K // DOT_K)):
            x_block = load_x(
                x_ptr=x_ptr,
                x_stride=x_stride,
                m=m,
                M=M,
                K=K,
                step=split,
                dot_index=j,
                DOT_K=DOT_K,
                BLOCK_K=BLOCK_K,
                K_SLICES=K_SLICES,
                EVEN_K=EVEN_K,
            )
            x_sum = dot(ones, x_block, acc=x_sum, UPCAST=UPCAST)
            x_block = _divide_by_place(
                x_block, first_k=j * DOT_K, NBITS=NBITS, FIELDS_PER_SHIFT=FIELDS_PER_SHIFT
            )
            if CODE_OFFSET > 0:
                scaled_sum = dot(ones, x_block, acc=scaled_sum, UPCAST=UPCAST)
            x_blocks += (_reorder(x_block, ADJACENT_PAIRS),)
        x_sums += (tl.max(x_sum, 1)[:, None, :],)
        offsets += ((tl.max(scaled_sum, 1) * CODE_OFFSET)[:, None, :],)
    return x_blocks, x_sums, offsets


@triton.jit
def _divide_by_place(x_block, first_k, NBITS: tl.constexpr, FIELDS_PER_SHIFT: tl.constexpr):
    """Divide each element of x by the power of two that its code is multiplied by.

    Codes of fields that share a shift are not shifted down individually: the operand is
    code * 2**(NBITS * place). x_block begins with element first_k of a slice, in its own order.
    """
    if FIELDS_PER_SHIFT > 1:
        field = (first_k + tl.arange(0, x_block.shape[1])) // 8 % (16 // NBITS)
        place = field % FIELDS_PER_SHIFT
        inverse_power = ((127 - place * NBITS) << 23).to(tl.float32, bitcast=True)  # by its bits
        x_block = (x_block.to(tl.float32) * inverse_power[None, :, None]).to(x_block.dtype)
    return x_block


@triton.jit
def _reorder(x_block, ADJACENT_PAIRS: tl.constexpr):
    """Bring x [K_SLICES, DOT_K, BLOCK_M] into the order in which `codes_to_pairs` leaves codes.

    Both orders have the same runs of 8 * ADJACENT_PAIRS codes. Within a run, x is ordered by field,
    word and code of the pair, but the codes by word, field and code of the pair.
    """
    K_SLICES: tl.constexpr = x_block.shape[0]
    DOT_K: tl.constexpr = x_block.shape[1]
    BLOCK_M: tl.constexpr = x_block.shape[2]
    RUNS: tl.constexpr = DOT_K // 8 // ADJACENT_PAIRS
    by_field = tl.reshape(x_block, (K_SLICES, RUNS, ADJACENT_PAIRS, 4, 2, BLOCK_M))
    return tl.reshape(tl.permute(by_field, (0, 1, 3, 2, 4, 5)), (K_SLICES, DOT_K, BLOCK_M))


@triton.jit
def sum_slices(acc, K_SLICES: tl.constexpr):
    """Sum acc [K_SLICES, BLOCK_N, BLOCK_M] over the slices, after one exchange between the warps.

    Neighbors are added pairwise. `tl.sum` would exchange every number once per warp: the kernel
    would take 3.5 instructions a weight instead of 2.9, for 16 rows of x at 4 bits.
    """
    BLOCK_N: tl.constexpr = acc.shape[1]
    BLOCK_M: tl.constexpr = acc.shape[2]
    # Make the slices the last dimension. Each level splits it into even and odd slices, and adds
    # both, until one is left.
    t = tl.permute(acc, (1, 2, 0))
    for level in tl.static_range(5):
        if K_SLICES >> level > 1:
            even, odd = tl.split(tl.reshape(t, (BLOCK_N, BLOCK_M, K_SLICES >> (level + 1), 2)))
            t = even + odd
    return tl.reshape(t, (BLOCK_N, BLOCK_M))
