"""Whole chunks of packed codes to weights: what the dequantizing kernels for axis 0 and 1 share.

The words of the packed layout, which `layout` defines:

* A unit is a part of the weight that is packed on its own: an output row (axis 1), or a row class
  (axis 0), whose codes are stored as [in_features, group_size].
* A chunk is 8 adjacent codes of a unit: 8 weights, which are 16 bytes in bf16.
* A plane stores some bits of every code of a unit. Codes of 3 bits have two planes: the low plane
  with their low two bits, and behind it the high plane with their high bit. Codes of 1, 2, 4 or 8
  bits have one plane. WIDTH is the number of bits of a code in a plane.
* A tile is 16 bytes of a plane: 4 words of 32 bits, each of two halfwords. A halfword has
  16 / WIDTH bit fields. Field i of halfword h stores code h of chunk i of the tile, so a tile
  stores 16 / WIDTH chunks.
"""

import triton
import triton.language as tl


@triton.jit
def dequantize_chunks(
    low_ptr, high_ptr, first_chunk, chunk, mask, scale_ptr, zero_ptr, NBITS: tl.constexpr
):
    """Return the weights of chunks first_chunk + chunk of a unit, fp32 [chunks, 8].

    Args:
        low_ptr: Pointer to the first byte of the unit's only plane, or for 3 bits of its low plane.
        high_ptr: For 3 bits, pointer to the first byte of the unit's high plane.
        first_chunk: A multiple of 16, so that it begins a tile in every plane.
        chunk: Numbers [chunks] of the chunks, counted from first_chunk.
        mask: Whether each chunk exists, [chunks].
        scale_ptr: Pointers [chunks] to the scale of every chunk's group; so is zero_ptr, to the
            zeros.
        zero_ptr: [chunks].
        NBITS: Bits of a code.
    """
    scale = tl.load(scale_ptr, mask)
    zero = tl.load(zero_ptr, mask)
    FLOAT_2_23: tl.constexpr = 8388608.0
    # `_codes_above_2_23` returns 2**23 + code * 2**shift, and 2**-shift as `unshift`. One fused
    # multiply-add leaves the code, exactly: (2**23 + code * 2**shift) * unshift - 2**23 * unshift.
    # For 3 bits, a second one adds 4 times the high bit. A chunk takes WIDTH bytes of a plane.
    if NBITS == 3:
        tiles = _load_tiles(plane_ptr=low_ptr + first_chunk * 2, chunk=chunk, mask=mask, WIDTH=2)
        high_tiles = _load_tiles(plane_ptr=high_ptr + first_chunk, chunk=chunk, mask=mask, WIDTH=1)
        even, odd, unshift = _codes_above_2_23(tiles=tiles, chunk=chunk, WIDTH=2)
        high_even, high_odd, high_unshift = _codes_above_2_23(
            tiles=high_tiles, chunk=chunk, WIDTH=1
        )
        high_unshift *= 4
        offset = -FLOAT_2_23 * (unshift + high_unshift)
        even = tl.fma(even, unshift, tl.fma(high_even, high_unshift, offset))
        odd = tl.fma(odd, unshift, tl.fma(high_odd, high_unshift, offset))
    else:
        tiles = _load_tiles(
            plane_ptr=low_ptr + first_chunk * NBITS, chunk=chunk, mask=mask, WIDTH=NBITS
        )
        even, odd, unshift = _codes_above_2_23(tiles=tiles, chunk=chunk, WIDTH=NBITS)
        even = tl.fma(even, unshift, -FLOAT_2_23 * unshift)
        odd = tl.fma(odd, unshift, -FLOAT_2_23 * unshift)
    zero, scale = zero.to(tl.float32)[:, None], scale.to(tl.float32)[:, None]
    # Interleave even and odd codes: [chunks, 4] and [chunks, 4] to [chunks, 8].
    return tl.reshape(tl.join((even - zero) * scale, (odd - zero) * scale), chunk.shape[0], 8)


@triton.jit
def _load_tiles(plane_ptr, chunk, mask, WIDTH: tl.constexpr):
    """Load the tile of each chunk as 4 words, uint32 [chunks, 4].

    The 16 / WIDTH chunks of a tile all load the same tile. The hardware reads it from memory once,
    and the thread that loads for a chunk can store the weights of this chunk, without a shuffle.
    """
    plane_ptr = plane_ptr.to(tl.pointer_type(tl.uint32))
    offset = (chunk // (16 // WIDTH) * 4)[:, None] + tl.arange(0, 4)[None, :]
    return tl.load(plane_ptr + offset, mask[:, None], other=0)


@triton.jit
def _codes_above_2_23(tiles, chunk, WIDTH: tl.constexpr):
    """Return even and odd codes of each chunk as 2**23 + code * 2**shift, and 2**-shift.

    Word w of a tile holds halfwords 2 w and 2 w + 1, and with them codes 2 w and 2 w + 1 of each
    chunk: the even codes are in the low halves of the words, the odd codes in the high halves.

    From 2**23 on, fp32 has no fraction bits: for 0 <= n < 2**23, the mantissa of 2**23 + n is n.
    An integer that is ORed into the bits of 2**23 therefore becomes a float with one instruction. A
    code lies `shift` bits above the lowest bit of its halfword, so n is code * 2**shift. It is not
    shifted down, which saves a second instruction.

    Returns:
        Even codes, odd codes (fp32 [chunks, 4]) and 2**-shift (fp32 [chunks, 1]).
    """
    FLOAT_2_23_BITS: tl.constexpr = 0x4B000000  # the bits of 2**23 as fp32
    shift = (chunk % (16 // WIDTH) * WIDTH)[:, None]
    code_mask = (((1 << WIDTH) - 1) << shift).to(tl.uint32)
    even = ((tiles & code_mask) | FLOAT_2_23_BITS).to(tl.float32, bitcast=True)
    odd = (((tiles >> 16) & code_mask) | FLOAT_2_23_BITS).to(tl.float32, bitcast=True)
    # 127 is the exponent bias of fp32: the bits of 2**-shift are (127 - shift) << 23.
    return even, odd, ((127 - shift) << 23).to(tl.float32, bitcast=True)
