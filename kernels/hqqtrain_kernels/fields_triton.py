"""Packed words to operands of a matrix product, without leaving the registers.

A 16-byte tile is 4 words: bit field i of word w holds codes 8 i + 2 w and 8 i + 2 w + 1, at bits 0
and 16. So a word, shifted and masked, is a pair of codes in one register, as a lane of a tensor
core instruction holds them. Everything here works on blocks [rows, words] of whole tiles.
"""

from typing import Any

import torch
import triton
import triton.language as tl


def _neighbours() -> int:
    major, minor = triton.__version__.split(".")[:2]
    return 2 if (int(major), int(minor)) < (3, 8) else 1


NEIGHBOURS = _neighbours()
"""How many of its pairs the compiler wants side by side in a lane, if the operand was joined from
halves: 2 up to Triton 3.7 (computeOrigBitWidth in its AccelerateMatmul.cpp halves the width of a
load that it takes for the cause), then 1. In any other order the operand goes through shared
memory, or shifts differ by lane: right, but slower."""


def integer_operands(dtype: torch.dtype, nbits: int) -> dict[str, Any]:
    """How codes are written as 16-bit floats: (OFFSET + code * 2**(nbits * plane)) * TINY.

    The smallest numbers of fp16 are codes. bf16 has integers above 128, with 7 bits for the codes
    of PLANES planes, those of 3 bits for one.
    """
    if dtype == torch.float16:
        return {"PLANES": 1, "OFFSET": 0.0, "TINY": 2.0**-24}
    return {"PLANES": 1 if nbits == 3 else 7 // nbits, "OFFSET": 128.0, "TINY": 1.0}


@triton.jit
def part(t, j: tl.constexpr):
    """t[:, j] of t [rows, n, columns], with n a power of two up to 32; moves nothing."""
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
def integers(
    words, WIDTH: tl.constexpr, TO: tl.constexpr, PLANES: tl.constexpr, NEIGHBOURS: tl.constexpr
):
    """Codes as integers, pairs of them: [rows, codes / 2 / NEIGHBOURS, NEIGHBOURS].

    words [rows, n, 4]: of n tiles, or of the same word of 4 tiles. A pair lies at bits
    TO + WIDTH * (i % PLANES) and 16 above: PLANES fields are masked after one shift. The order is
    n, fields by NEIGHBOURS, 4, NEIGHBOURS fields, 2.
    """
    rows: tl.constexpr = words.shape[0]
    n: tl.constexpr = words.shape[1]
    FIELDS: tl.constexpr = 16 // WIDTH
    i = tl.arange(0, FIELDS // NEIGHBOURS)[:, None, None] * NEIGHBOURS
    i = (i + tl.arange(0, NEIGHBOURS)[None, None, :])[None, None, :, :, :]
    shift = i // PLANES * (PLANES * WIDTH) - TO
    pairs = tl.reshape(words, (rows, n, 1, 4, 1)) >> tl.maximum(shift, 0) << tl.maximum(-shift, 0)
    pairs = pairs & ((((1 << WIDTH) - 1) * (0x10001 << TO)) << (i % PLANES * WIDTH))
    return tl.reshape(pairs, (rows, n * FIELDS * 4 // NEIGHBOURS, NEIGHBOURS))


@triton.jit
def hidden(VALUE: tl.constexpr, ROWS: tl.constexpr):
    """VALUE, int32 [ROWS, 1, 1], in a way that the compiler does not see: i (i + 1) is even.

    To mask and OR with two plain constants it takes two instructions, where the machine has one:
    64 instead of 32 of them for 64 weights.
    """
    i = tl.arange(0, ROWS) & 7
    return (VALUE + (i * (i + 1) & 1))[:, None, None]


@triton.jit
def halves(pairs, DTYPE: tl.constexpr):
    """The bits of pairs [rows, n, m] as 16-bit floats: [rows, 2 n m]."""
    low = (pairs & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return tl.reshape(
        tl.join(low, high), (pairs.shape[0], pairs.shape[1] * pairs.shape[2] * 2)
    )  # fmt: skip


@triton.jit
def numbers(words, WIDTH: tl.constexpr):
    """Codes as fp32, in their own order: [rows, codes].

    ORed into the mantissa of 2**23 a code is a float in one instruction, without shifting it.
    """
    rows: tl.constexpr = words.shape[0]
    tiles: tl.constexpr = words.shape[1] // 4
    words = tl.reshape(words, (rows, tiles, 1, 4))
    shift = (tl.arange(0, 16 // WIDTH) * WIDTH)[None, None, :, None]
    mask = ((1 << WIDTH) - 1) << shift
    unit = ((127 - shift) << 23).to(tl.float32, bitcast=True)
    exponent = hidden(0x4B000000, rows)[:, :, :, None]
    low = ((words & mask) | exponent).to(tl.float32, bitcast=True)
    high = (((words >> 16) & mask) | exponent).to(tl.float32, bitcast=True)
    pairs = tl.join(tl.fma(low, unit, -8388608.0 * unit), tl.fma(high, unit, -8388608.0 * unit))
    return tl.reshape(pairs, (rows, tiles * (16 // WIDTH) * 8))
