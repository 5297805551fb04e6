"""Packed words to operands of a matrix product, without leaving the registers.

A tile of the packed layout (see `layout`) is 16 bytes: 4 words of 32 bits. Each word consists of
two halfwords of 16 / WIDTH bit fields, where WIDTH is the number of bits of a code in its plane.
Field i of the low halfword of word w holds code 8 i + 2 w of the tile, and field i of the high
halfword holds code 8 i + 2 w + 1. A word that is shifted and masked is therefore a pair of adjacent
codes in one register, which is how a lane of a tensor core instruction takes its operands.
Everything here works on blocks [rows, words] of whole tiles.
"""

from typing import Any

import torch
import triton
import triton.language as tl


def _adjacent_pairs() -> int:
    major, minor = triton.__version__.split(".")[:2]
    return 2 if (int(major), int(minor)) < (3, 8) else 1


ADJACENT_PAIRS = _adjacent_pairs()
"""How many pairs of codes must be side by side in a lane, so that they stay in its registers.

An operand is joined from the low and the high codes of its pairs (`pairs_to_halves`).

The number is 2 up to Triton 3.7, where computeOrigBitWidth in AccelerateMatmul.cpp halves the width
of a load that it takes for the operand's source. It is 1 from Triton 3.8 on. In any other order the
operand goes through shared memory, or shifts differ by lane: the result is the same, but slower.
"""


def operand_format(dtype: torch.dtype, nbits: int) -> dict[str, Any]:
    """Return the constexprs that say how codes are written as 16-bit floats.

    The 16-bit float of field i is (CODE_OFFSET + code * 2**(nbits * place)) * CODE_STEP, where
    place = i % FIELDS_PER_SHIFT is the field's position among those that share a shift.

    * fp16: the bits of a code, as a float, are a subnormal number: code * 2**-24. Each field is
      shifted down to bit 0.
    * bf16: an integer from 128 to 255 has its low 7 bits in the mantissa. These 7 bits have room
      for FIELDS_PER_SHIFT adjacent fields, so one shift serves them all; a mask then leaves one
      field, in its place. 3-bit codes are put together from two planes, and get one field.
    """
    if dtype == torch.float16:
        return {"FIELDS_PER_SHIFT": 1, "CODE_OFFSET": 0.0, "CODE_STEP": 2.0**-24}
    fields_per_shift = 1 if nbits == 3 else 7 // nbits
    return {"FIELDS_PER_SHIFT": fields_per_shift, "CODE_OFFSET": 128.0, "CODE_STEP": 1.0}


@triton.jit
def take(t, j: tl.constexpr):
    """Return t[:, j] of t [rows, n, columns], without moving data. n is a power of two up to 32.

    Triton cannot index a block, but it can split a trailing dimension of 2 into two blocks. Each
    level splits n into even and odd numbers and keeps the half that contains j, by the next bit of
    j from the lowest on. After log2(n) levels only t[:, j] is left.
    """
    rows: tl.constexpr = t.shape[0]
    n: tl.constexpr = t.shape[1]
    columns: tl.constexpr = t.shape[2]
    t = tl.permute(t, (0, 2, 1))
    for level in tl.static_range(5):
        if n >> level > 1:
            even, odd = tl.split(tl.reshape(t, (rows, columns, n >> (level + 1), 2)))
            t = odd if (j >> level) % 2 == 1 else even
    return tl.reshape(t, (rows, columns))


@triton.jit
def codes_to_pairs(
    words,
    WIDTH: tl.constexpr,
    FIRST_BIT: tl.constexpr,
    FIELDS_PER_SHIFT: tl.constexpr,
    ADJACENT_PAIRS: tl.constexpr,
):
    """Extract codes of WIDTH bits as integers, in pairs.

    Args:
        words: [rows, n, 4]: the 4 words of n tiles, or (in the GEMV) word n of 4 tiles.
        WIDTH: Bits of a code.
        FIRST_BIT: Where the lowest code of a pair is to begin.
        FIELDS_PER_SHIFT: Fields that are masked after one shift; see `operand_format`.
        ADJACENT_PAIRS: See the constant of that name.

    Returns:
        [rows, codes / 2 / ADJACENT_PAIRS, ADJACENT_PAIRS] int32. The codes of field i lie at bit
        FIRST_BIT + WIDTH * (i % FIELDS_PER_SHIFT) and 16 bits above it. From the slowest dimension
        to the fastest, the codes are ordered by: n; runs of ADJACENT_PAIRS fields; the last
        dimension of `words`; the fields of a run; the two codes of a pair.
    """
    rows: tl.constexpr = words.shape[0]
    n: tl.constexpr = words.shape[1]
    FIELDS: tl.constexpr = 16 // WIDTH
    # Number of the field, [1, 1, fields / ADJACENT_PAIRS, 1, ADJACENT_PAIRS].
    field = tl.arange(0, FIELDS // ADJACENT_PAIRS)[:, None, None] * ADJACENT_PAIRS
    field = (field + tl.arange(0, ADJACENT_PAIRS)[None, None, :])[None, None, :, :, :]
    # Shift right, or left where the fields must move up; one of the two shifts is by 0.
    shift = field // FIELDS_PER_SHIFT * (FIELDS_PER_SHIFT * WIDTH) - FIRST_BIT
    pairs = tl.reshape(words, (rows, n, 1, 4, 1)) >> tl.maximum(shift, 0) << tl.maximum(-shift, 0)
    # One mask selects the code in the low halfword and the one in the high halfword (0x10001).
    mask = (((1 << WIDTH) - 1) * (0x10001 << FIRST_BIT)) << (field % FIELDS_PER_SHIFT * WIDTH)
    pairs = pairs & mask
    return tl.reshape(pairs, (rows, n * FIELDS * 4 // ADJACENT_PAIRS, ADJACENT_PAIRS))


@triton.jit
def opaque_constant(VALUE: tl.constexpr, ROWS: tl.constexpr):
    """Return VALUE, int32 [ROWS, 1, 1], in a way that hides from the compiler that it is constant.

    The GPU has one instruction that masks and ORs. With two plain constants the compiler uses two
    instructions instead: 64 instead of 32 for 64 weights. i (i + 1) is even, so adding its lowest
    bit changes nothing.
    """
    i = tl.arange(0, ROWS) & 7
    return (VALUE + (i * (i + 1) & 1))[:, None, None]


@triton.jit
def pairs_to_halves(pairs, DTYPE: tl.constexpr):
    """Reinterpret the halfwords of pairs [rows, n, m] as 16-bit floats [rows, 2 n m]."""
    low = (pairs & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    halves = tl.join(low, high)
    return tl.reshape(halves, (pairs.shape[0], pairs.shape[1] * pairs.shape[2] * 2))


@triton.jit
def codes_to_fp32(words, WIDTH: tl.constexpr):
    """Convert codes of WIDTH bits to fp32, in their own order: words [rows, n] to [rows, codes].

    `dequantize_chunks_triton` explains the conversion: a code that is ORed into the mantissa of
    2**23 is the float 2**23 + code * 2**shift, and one fused multiply-add leaves the code, exactly.
    """
    FLOAT_2_23: tl.constexpr = 8388608.0
    FLOAT_2_23_BITS: tl.constexpr = 0x4B000000
    rows: tl.constexpr = words.shape[0]
    tiles: tl.constexpr = words.shape[1] // 4
    words = tl.reshape(words, (rows, tiles, 1, 4))
    shift = (tl.arange(0, 16 // WIDTH) * WIDTH)[None, None, :, None]
    mask = ((1 << WIDTH) - 1) << shift
    unshift = ((127 - shift) << 23).to(tl.float32, bitcast=True)  # 2**-shift
    exponent = opaque_constant(FLOAT_2_23_BITS, rows)[:, :, :, None]
    even = ((words & mask) | exponent).to(tl.float32, bitcast=True)
    odd = (((words >> 16) & mask) | exponent).to(tl.float32, bitcast=True)
    even = tl.fma(even, unshift, -FLOAT_2_23 * unshift)
    odd = tl.fma(odd, unshift, -FLOAT_2_23 * unshift)
    return tl.reshape(tl.join(even, odd), (rows, tiles * (16 // WIDTH) * 8))
