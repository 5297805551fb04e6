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
    """Load the codes of one split of rows as 16-bit floats: [K_SLICES * rows, BLOCK_K]."""
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
    CHUNK_K: tl.constexpr,
    FIELDS_PER_SHIFT: tl.constexpr,
    CODE_OFFSET: tl.constexpr,
    ADJACENT_PAIRS: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Load one split of x, and prepare all that the products need of it.

    Returns:
        x_chunks: For every chunk, x [K_SLICES, CHUNK_K, BLOCK_M] in the order of the codes.
        x_sums: For every group, the sum of x [K_SLICES, 1, BLOCK_M].
        offsets: For every group, CODE_OFFSET times the sum of what multiplies the codes, likewise.

    The sums are computed by tensor cores, as products with ones: the result then has the layout of
    the products it is used with, and needs no conversion per step.
    """
    x_chunks = ()
    x_sums = ()
    offsets = ()
    m = tl.arange(0, BLOCK_M)
    # 16 equal rows, the fewest of a tensor core product; any row of the result is the sum.
    ones = tl.full((K_SLICES, 16, CHUNK_K), 1.0, x_ptr.dtype.element_ty)
    for g in tl.static_range(BLOCK_K // GROUP_K):
        x_sum = tl.zeros((K_SLICES, 16, BLOCK_M), tl.float32)
        scaled_sum = x_sum
        for j in tl.static_range(g * (GROUP_K // CHUNK_K), (g + 1) * (GROUP_K // CHUNK_K)):
            b = load_x(
                x_ptr=x_ptr,
                x_stride=x_stride,
                m=m,
                M=M,
                K=K,
                step=split,
                chunk=j,
                CHUNK_K=CHUNK_K,
                BLOCK_K=BLOCK_K,
                K_SLICES=K_SLICES,
                EVEN_K=EVEN_K,
            )
            x_sum = dot(ones, b, acc=x_sum, UPCAST=UPCAST)
            b = _divide_by_place(b=b, k=j * CHUNK_K, NBITS=NBITS, FIELDS_PER_SHIFT=FIELDS_PER_SHIFT)
            if CODE_OFFSET > 0:
                scaled_sum = dot(ones, b, acc=scaled_sum, UPCAST=UPCAST)
            x_chunks += (_reorder(b, ADJACENT_PAIRS),)
        x_sums += (tl.max(x_sum, 1)[:, None, :],)
        offsets += ((tl.max(scaled_sum, 1) * CODE_OFFSET)[:, None, :],)
    return x_chunks, x_sums, offsets


@triton.jit
def _divide_by_place(b, k, NBITS: tl.constexpr, FIELDS_PER_SHIFT: tl.constexpr):
    """Divide x, from its element k on, by the power of two that its code is multiplied by.

    Codes of fields that share a shift are not shifted down individually: the operand is
    code * 2**(NBITS * place).
    """
    if FIELDS_PER_SHIFT > 1:
        field = (k + tl.arange(0, b.shape[1])) // 8 % (16 // NBITS)
        power = ((127 - field % FIELDS_PER_SHIFT * NBITS) << 23).to(tl.float32, bitcast=True)
        b = (b.to(tl.float32) * power[None, :, None]).to(b.dtype)
    return b


@triton.jit
def _reorder(b, ADJACENT_PAIRS: tl.constexpr):
    """Bring x [K_SLICES, CHUNK_K, BLOCK_M] into the order in which `codes_to_pairs` leaves codes.

    Both orders agree outside of runs of 8 * ADJACENT_PAIRS codes.
    """
    slices: tl.constexpr = b.shape[0]
    chunk: tl.constexpr = b.shape[1]
    batch: tl.constexpr = b.shape[2]
    t = tl.reshape(b, (slices, chunk // 8 // ADJACENT_PAIRS, ADJACENT_PAIRS, 4, 2, batch))
    return tl.reshape(tl.permute(t, (0, 1, 3, 2, 4, 5)), (slices, chunk, batch))


@triton.jit
def sum_slices(acc, K_SLICES: tl.constexpr):
    """Sum acc [K_SLICES, rows, batch] over the slices, pairwise, after one exchange between warps.

    `tl.sum` would exchange every number once per warp: 3.5 instructions a weight instead of 2.9,
    for 16 rows of x at 4 bits.
    """
    rows: tl.constexpr = acc.shape[1]
    batch: tl.constexpr = acc.shape[2]
    # The slices become the last dimension, which `tl.split` halves: level by level, two neighbors
    # are added.
    t = tl.permute(acc, (1, 2, 0))
    for level in tl.static_range(5):
        if K_SLICES >> level > 1:
            even, odd = tl.split(tl.reshape(t, (rows, batch, K_SLICES >> (level + 1), 2)))
            t = even + odd
    return tl.reshape(t, (rows, batch))
