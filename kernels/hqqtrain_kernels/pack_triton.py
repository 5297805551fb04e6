"""Packing of codes at the end of a quantizing kernel, with the bits of `reference.pack`.

The words of the packed layout, which `layout` defines:

* A unit is a part of the weight that is packed on its own: an output row (axis 1) or a row class
  (axis 0).
* A chunk is 8 adjacent codes of a unit.
* A plane stores some bits of every code of a unit. Codes of 3 bits have two planes: the low plane
  with their low two bits, and behind it the high plane with their high bit. Codes of 1, 2, 4 or 8
  bits have one plane. WIDTH is the number of bits of a code in a plane.
* A tile is 16 bytes of a plane: 8 halfwords of 16 bits, or 4 words of 32 bits. A halfword has
  16 / WIDTH bit fields. Field i of halfword h stores code h of chunk i of the tile, so a tile
  stores 16 / WIDTH chunks.
* A cell is the smallest number of whole groups that fills whole tiles of every plane. It can be
  stored without reading the tiles of its neighbors.
"""

import triton
import triton.language as tl


@triton.jit
def store_packed(
    codes,
    unit_ptr,
    cell,
    chunks,
    CELL_CODES: tl.constexpr,
    NBITS: tl.constexpr,
    LOW_PLANE_TILES: tl.constexpr,
):
    """Pack the codes of whole cells, and store them in their unit.

    Args:
        codes: int32 [chunks of the program, 8]. Bits from bit 20 on are ignored: `nearest_codes`
            leaves an offset there.
        unit_ptr: Pointer to the first halfword (int16) of the unit.
        cell: Number of the program's first cell in the unit. Its other cells follow it. Or, if they
            are not adjacent, a block [cells of the program] with the number of each.
        chunks: Chunks of the unit. Tiles without any of them are not stored.
        CELL_CODES: Codes of a cell.
        NBITS: Bits of a code.
        LOW_PLANE_TILES: Tiles of the low plane. The high plane of 3-bit codes begins behind them.
    """
    if NBITS == 3:
        _store_plane(
            codes=codes & 3,
            plane_ptr=unit_ptr,
            cell=cell,
            chunks=chunks,
            CELL_CODES=CELL_CODES,
            WIDTH=2,
            LOG2_TILE_CHUNKS=3,
        )
        _store_plane(
            codes=codes >> 2,
            plane_ptr=unit_ptr + LOW_PLANE_TILES * 8,  # 8 halfwords in a tile
            cell=cell,
            chunks=chunks,
            CELL_CODES=CELL_CODES,
            WIDTH=1,
            LOG2_TILE_CHUNKS=4,
        )
    else:
        # log2(16 / NBITS): 1, 2, 3 and 4 for 8, 4, 2 and 1 bits.
        LOG2_TILE_CHUNKS: tl.constexpr = 1 if NBITS == 8 else 2 if NBITS == 4 else 5 - NBITS
        _store_plane(
            codes=codes,
            plane_ptr=unit_ptr,
            cell=cell,
            chunks=chunks,
            CELL_CODES=CELL_CODES,
            WIDTH=NBITS,
            LOG2_TILE_CHUNKS=LOG2_TILE_CHUNKS,
        )


@triton.jit
def _store_plane(
    codes,
    plane_ptr,
    cell,
    chunks,
    CELL_CODES: tl.constexpr,
    WIDTH: tl.constexpr,
    LOG2_TILE_CHUNKS: tl.constexpr,
):
    """Pack codes of WIDTH bits into the tiles of one plane, and store the tiles.

    Args:
        codes: int32 [chunks of the program, 8]. Only the low 16 bits are used, and in them only the
            WIDTH lowest are not zero.
        plane_ptr: Pointer to the first halfword of the plane.
        cell: As for `store_packed`; so are chunks and CELL_CODES.
        chunks: Chunks of the unit.
        CELL_CODES: Codes of a cell.
        WIDTH: Bits of a code in this plane.
        LOG2_TILE_CHUNKS: log2 of the chunks of a tile, 16 / WIDTH.
    """
    # 1. Put chunk i of a tile into field i of the tile's halfwords: [chunks, 8] -> [tiles, 8].
    #    Each pass merges neighbors. It shifts the second of two above the fields of the first, and
    #    adds both, whose fields do not overlap. One sum over all chunks of a tile would be simpler,
    #    but Triton 3.6 computes it wrong if the lanes that hold the chunks are not adjacent. They
    #    are not where several threads share a group. A sum over two is right.
    halfwords = codes
    for level in tl.static_range(LOG2_TILE_CHUNKS):
        pairs = tl.reshape(halfwords, halfwords.shape[0] // 2, 2, 8)
        halfwords = tl.sum(pairs << (tl.arange(0, 2)[None, :, None] * (WIDTH << level)), 1)
    # 2. Number the tiles within the plane. A cell fills CELL_TILES of them.
    PROGRAM_TILES: tl.constexpr = halfwords.shape[0]
    CELL_TILES: tl.constexpr = CELL_CODES * WIDTH // 128
    if cell.type.is_block():
        tile = cell[:, None] * CELL_TILES + tl.arange(0, CELL_TILES)[None, :]
        tile = tl.reshape(tile, (PROGRAM_TILES,))
    else:
        tile = cell * CELL_TILES + tl.arange(0, PROGRAM_TILES)
    tile = tile.to(tl.int64)
    # 3. Store the tiles that belong to the unit: its chunks, rounded up to whole tiles.
    offset = tile[:, None] * 8 + tl.arange(0, 8)[None, :]
    plane_tiles = (chunks + (1 << LOG2_TILE_CHUNKS) - 1) >> LOG2_TILE_CHUNKS
    mask = tile < plane_tiles
    tl.store(plane_ptr + offset, halfwords.to(tl.int16), mask[:, None])
