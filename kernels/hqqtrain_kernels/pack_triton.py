"""Codes to packed rows, in the layout of `reference.pack`, at the end of a kernel."""

import triton
import triton.language as tl


@triton.jit
def store_packed(
    codes,
    row_ptr,
    cell,
    chunks,
    CELL_CODES: tl.constexpr,
    NBITS: tl.constexpr,
    PLANE_TILES: tl.constexpr,
):
    """Pack codes and store them in a unit.

    Args:
        codes: int32 [chunks of the program, 8], the codes of whole cells. A cell is as many groups
            as fill whole tiles.
        row_ptr: The halfwords of the unit.
        cell: Number of the program's first cell in the unit, or a block with the number of each of
            its cells.
        chunks: Chunks of 8 codes in the unit. Tiles beyond them are not stored.
        CELL_CODES: Codes of a cell.
        NBITS: Bits of a code.
        PLANE_TILES: Tiles of the low plane, after which the high plane of 3-bit codes begins.
    """
    # Halvings: log2 of the chunks that share a tile, 16 / width.
    if NBITS == 3:
        _store_plane(
            codes=codes & 3,
            row_ptr=row_ptr,
            cell=cell,
            chunks=chunks,
            CELL_CODES=CELL_CODES,
            WIDTH=2,
            HALVINGS=3,
        )
        _store_plane(
            codes=codes >> 2,
            row_ptr=row_ptr + PLANE_TILES * 8,
            cell=cell,
            chunks=chunks,
            CELL_CODES=CELL_CODES,
            WIDTH=1,
            HALVINGS=4,
        )
    else:
        HALVINGS: tl.constexpr = 1 if NBITS == 8 else 2 if NBITS == 4 else 5 - NBITS
        _store_plane(
            codes=codes,
            row_ptr=row_ptr,
            cell=cell,
            chunks=chunks,
            CELL_CODES=CELL_CODES,
            WIDTH=NBITS,
            HALVINGS=HALVINGS,
        )


@triton.jit
def _store_plane(
    codes,
    row_ptr,
    cell,
    chunks,
    CELL_CODES: tl.constexpr,
    WIDTH: tl.constexpr,
    HALVINGS: tl.constexpr,
):
    """Pack codes of WIDTH bits into tiles of 8 halfwords, and store the tiles.

    Chunk i of a tile goes into bit field i of the tile's halfwords. Two neighbors are combined at a
    time: Triton 3.6 computes a wrong sum over lanes that are not adjacent, as the lanes of a tile
    are where threads share a group. Over two lanes it is right.
    """
    for i in tl.static_range(HALVINGS):
        pairs = tl.reshape(codes, codes.shape[0] // 2, 2, 8)
        codes = tl.sum(pairs << (tl.arange(0, 2)[None, :, None] * (WIDTH << i)), 1)
    COUNT: tl.constexpr = codes.shape[0]
    CELL_TILES: tl.constexpr = CELL_CODES * WIDTH // 128
    if cell.type.is_block():
        tile = tl.reshape(cell[:, None] * CELL_TILES + tl.arange(0, CELL_TILES)[None, :], (COUNT,))
    else:
        tile = cell * CELL_TILES + tl.arange(0, COUNT)
    tile = tile.to(tl.int64)
    at = tile[:, None] * 8 + tl.arange(0, 8)[None, :]
    mask = tile < (chunks + (1 << HALVINGS) - 1) >> HALVINGS
    tl.store(row_ptr + at, codes.to(tl.int16), mask[:, None])
