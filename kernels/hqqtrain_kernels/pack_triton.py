"""Codes to packed rows, as `reference.pack` lays them out, at the end of a kernel."""

import triton
import triton.language as tl


@triton.jit
def store_packed(
    codes, row, place, chunks, CODES: tl.constexpr, NBITS: tl.constexpr, TILES: tl.constexpr
):
    """Packs chunks of codes [chunks, 8], from cell `place` of a unit on, or of every cell [cells]
    where it belongs.

    A cell has CODES codes; `row`: the halfwords of the unit, which has `chunks` chunks. The plane
    of the high bits of 3 begins TILES tiles later.
    """
    if NBITS == 3:
        _store_plane(codes & 3, row, place, chunks, CODES, 2, 3)
        _store_plane(codes >> 2, row + TILES * 8, place, chunks, CODES, 1, 4)
    else:
        HALVINGS: tl.constexpr = 1 if NBITS == 8 else 2 if NBITS == 4 else 5 - NBITS
        _store_plane(codes, row, place, chunks, CODES, NBITS, HALVINGS)


@triton.jit
def _store_plane(
    codes, row, place, chunks, CODES: tl.constexpr, WIDTH: tl.constexpr, HALVINGS: tl.constexpr
):
    """Of WIDTH bits, into tiles of 8 halfwords.

    By halves: Triton 3.6 gets a sum wrong that runs over lanes which are not neighbours, as those
    of a tile are where threads share a group; over two of them it is right.
    """
    for i in tl.static_range(HALVINGS):
        pairs = tl.reshape(codes, codes.shape[0] // 2, 2, 8)
        codes = tl.sum(pairs << (tl.arange(0, 2)[None, :, None] * (WIDTH << i)), 1)
    COUNT: tl.constexpr = codes.shape[0]
    TILES: tl.constexpr = CODES * WIDTH // 128
    if place.type.is_block():
        tile = tl.reshape(place[:, None] * TILES + tl.arange(0, TILES)[None, :], (COUNT,))
    else:
        tile = place * TILES + tl.arange(0, COUNT)
    tile = tile.to(tl.int64)
    at = tile[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = tile < (chunks + (1 << HALVINGS) - 1) >> HALVINGS
    tl.store(row + at, codes.to(tl.int16), inside[:, None])
