"""Packed words to operands of a matrix product, without leaving the registers.

A 16-byte tile is 4 words (int32). Bit field i of word w holds code 8 i + 2 w at bit 0 of the field,
and code 8 i + 2 w + 1 sixteen bits above: a word, shifted and masked, is a pair of codes in one
register, as a lane of a tensor core instruction takes them. Everything here works on blocks
[rows, words] of whole tiles.
"""

from typing import Any

import torch
import triton
import triton.language as tl


def _adjacent_pairs() -> int:
    major, minor = triton.__version__.split(".")[:2]
    return 2 if (int(major), int(minor)) < (3, 8) else 1


ADJACENT_PAIRS = _adjacent_pairs()
"""How many pairs the compiler wants side by side in a lane, if the operand was joined from halves.

It is 2 up to Triton 3.7, where computeOrigBitWidth in AccelerateMatmul.cpp halves the width of a
load that it takes for the operand's source, and 1 from Triton 3.8 on. In any other order the
operand goes through shared memory, or shifts differ by lane: correct, but slower.
"""


def operand_format(dtype: torch.dtype, nbits: int) -> dict[str, Any]:
    """Return the constexprs that say how codes are written as 16-bit floats.

    Field i holds (CODE_OFFSET + code * 2**(nbits * (i % FIELDS_PER_SHIFT))) * CODE_UNIT.

    * fp16: codes are its smallest subnormal numbers, multiples of 2**-24. Each field is shifted
      down to bit 0.
    * bf16: integers above 128 have their low 7 bits in the mantissa. Those hold the codes of
      FIELDS_PER_SHIFT adjacent fields, one after the other, so that one shift serves them all.
      3-bit codes, which are stored in two planes, get one field.
    """
    if dtype == torch.float16:
        return {"FIELDS_PER_SHIFT": 1, "CODE_OFFSET": 0.0, "CODE_UNIT": 2.0**-24}
    fields_per_shift = 1 if nbits == 3 else 7 // nbits
    return {"FIELDS_PER_SHIFT": fields_per_shift, "CODE_OFFSET": 128.0, "CODE_UNIT": 1.0}


@triton.jit
def take(t, j: tl.constexpr):
    """Return t[:, j] of t [rows, n, columns], n a power of two up to 32, without moving data.

    Triton cannot index a block. Splitting a trailing dimension of 2 can keep either half: bit by
    bit of j, from the lowest, this halves n until one column is left.
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
        words: [rows, n, 4]: the words of n tiles, or the same word of 4 tiles.
        WIDTH: Bits of a code.
        FIRST_BIT: Where the lowest code of a pair is to begin.
        FIELDS_PER_SHIFT: Fields that are masked after one shift; see `operand_format`.
        ADJACENT_PAIRS: See the constant of that name.

    Returns:
        [rows, codes / 2 / ADJACENT_PAIRS, ADJACENT_PAIRS] int32. The codes of field i lie at bit
        FIRST_BIT + WIDTH * (i % FIELDS_PER_SHIFT) and 16 above. They are in the order of n, fields
        by ADJACENT_PAIRS, 4, ADJACENT_PAIRS fields, 2.
    """
    rows: tl.constexpr = words.shape[0]
    n: tl.constexpr = words.shape[1]
    FIELDS: tl.constexpr = 16 // WIDTH
    # i: the number of the field, [1, 1, fields / ADJACENT_PAIRS, 1, ADJACENT_PAIRS].
    i = tl.arange(0, FIELDS // ADJACENT_PAIRS)[:, None, None] * ADJACENT_PAIRS
    i = (i + tl.arange(0, ADJACENT_PAIRS)[None, None, :])[None, None, :, :, :]
    # Shift right, or left where the fields must move up; one of the two shifts is by 0.
    shift = i // FIELDS_PER_SHIFT * (FIELDS_PER_SHIFT * WIDTH) - FIRST_BIT
    pairs = tl.reshape(words, (rows, n, 1, 4, 1)) >> tl.maximum(shift, 0) << tl.maximum(-shift, 0)
    # One mask selects the code in the low halfword and the one in the high halfword (0x10001).
    mask = (((1 << WIDTH) - 1) * (0x10001 << FIRST_BIT)) << (i % FIELDS_PER_SHIFT * WIDTH)
    pairs = pairs & mask
    return tl.reshape(pairs, (rows, n * FIELDS * 4 // ADJACENT_PAIRS, ADJACENT_PAIRS))


@triton.jit
def opaque_constant(VALUE: tl.constexpr, ROWS: tl.constexpr):
    """Return VALUE, int32 [ROWS, 1, 1], such that the compiler does not see that it is constant.

    i (i + 1) is even, so its lowest bit adds nothing. With two plain constants, masking and ORing
    take two instructions, where the machine has one for both: 64 instead of 32 of them for 64
    weights.
    """
    i = tl.arange(0, ROWS) & 7
    return (VALUE + (i * (i + 1) & 1))[:, None, None]


@triton.jit
def pairs_to_halves(pairs, DTYPE: tl.constexpr):
    """Reinterpret the bits of pairs [rows, n, m] as 16-bit floats [rows, 2 n m]."""
    low = (pairs & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    halves = tl.join(low, high)
    return tl.reshape(halves, (pairs.shape[0], pairs.shape[1] * pairs.shape[2] * 2))


@triton.jit
def codes_to_fp32(words, WIDTH: tl.constexpr):
    """Convert codes of WIDTH bits to fp32, in their own order: words [rows, n] to [rows, codes].

    ORed into the mantissa of 2**23, a code is a float after one instruction, without a shift: the
    float is 2**23 + code * 2**shift. One fused multiply-add then removes both, exactly.
    """
    rows: tl.constexpr = words.shape[0]
    tiles: tl.constexpr = words.shape[1] // 4
    words = tl.reshape(words, (rows, tiles, 1, 4))
    shift = (tl.arange(0, 16 // WIDTH) * WIDTH)[None, None, :, None]
    mask = ((1 << WIDTH) - 1) << shift
    inverse_shift = ((127 - shift) << 23).to(tl.float32, bitcast=True)  # 2**-shift
    exponent = opaque_constant(0x4B000000, rows)[:, :, :, None]  # the bits of 2**23
    low = ((words & mask) | exponent).to(tl.float32, bitcast=True)
    high = (((words >> 16) & mask) | exponent).to(tl.float32, bitcast=True)
    low = tl.fma(low, inverse_shift, -8388608.0 * inverse_shift)
    high = tl.fma(high, inverse_shift, -8388608.0 * inverse_shift)
    return tl.reshape(tl.join(low, high), (rows, tiles * (16 // WIDTH) * 8))
