"""The kernels of the fused quantizer. A program quantizes G groups at a time.

hqq's solver takes two launches. The first defers the few groups whose residuals shrink, because
that code needs 40 more registers: it stores DEFERRED in place of their scale. The second launch
searches for these marks and quantizes the marked groups.

`pack_triton` explains the cell, which is the smallest set of whole groups that is packed on its
own, and `solve_triton` explains the tile, which is the G groups that a program has in registers.
"""

import triton
import triton.language as tl

from hqqtrain_kernels.tile_triton import DEFERRED, quantize_tile

SEARCHED_TILES = tl.constexpr(32)
"""Tiles of G groups that one program of the second launch searches.

One program can search many, because the first launch defers few groups, and none of most weights.
"""


@triton.jit(do_not_specialize=["programs_per_unit", "groups", "row_stride", "units", "units_again"])
def quantize_kernel(
    W_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    not_finite_ptr,
    programs_per_unit,
    groups,
    row_stride,
    units,
    units_again,
    STRIDE_DIVISOR: tl.constexpr,
    TILE: tl.constexpr,
):
    """Quantize G adjacent groups. `quantize_tile` explains the arguments.

    row_stride is passed as a quotient and multiplied by the constant STRIDE_DIVISOR here: this way
    the compiler sees how the rows of W are aligned, although integers are not specialized.
    """
    G: tl.constexpr = TILE.G
    CELL_GROUPS: tl.constexpr = TILE.cell_groups
    unit_index = (tl.program_id(0) // programs_per_unit).to(tl.int64)
    first_group = (tl.program_id(0) % programs_per_unit) * G
    quantize_tile(
        W_ptr=W_ptr,
        codes_ptr=codes_ptr,
        scale_ptr=scale_ptr,
        zero_ptr=zero_ptr,
        not_finite_ptr=not_finite_ptr,
        unit_index=unit_index,
        group=first_group + tl.arange(0, G),
        cell=first_group // CELL_GROUPS,
        groups=groups,
        row_stride=row_stride.to(tl.int64) * STRIDE_DIVISOR,
        units=units,
        units_again=units_again,
        SHRINKS=False,
        TILE=TILE,
    )


@triton.jit(do_not_specialize=["programs_per_unit", "groups", "row_stride", "units", "units_again"])
def quantize_deferred_kernel(
    W_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    not_finite_ptr,
    programs_per_unit,
    groups,
    row_stride,
    units,
    units_again,
    STRIDE_DIVISOR: tl.constexpr,
    TILE: tl.constexpr,
):
    """Quantize the groups that `quantize_kernel` deferred, among SEARCHED_TILES * G groups.

    G groups are quantized at a time: whole cells, including those of their groups that the first
    launch has finished. A cell fills whole packed tiles, so storing it overwrites no other cell.
    """
    G: tl.constexpr = TILE.G
    CELL_GROUPS: tl.constexpr = TILE.cell_groups
    unit_index = (tl.program_id(0) // programs_per_unit).to(tl.int64)
    first_cell = (tl.program_id(0) % programs_per_unit) * (SEARCHED_TILES * G // CELL_GROUPS)
    unit_scale_ptr = scale_ptr + unit_index * groups
    cell = tl.zeros((G // CELL_GROUPS,), tl.int32)
    # For most weights this one test of all scales is enough: no group is deferred.
    deferred_cells = _any_deferred(
        unit_scale_ptr=unit_scale_ptr,
        first_group=first_cell * CELL_GROUPS,
        groups=groups,
        COUNT=SEARCHED_TILES * G,
    )
    if deferred_cells > 0:
        cell, deferred_cells = _find_deferred(
            unit_scale_ptr=unit_scale_ptr,
            first_cell=first_cell,
            groups=groups,
            G=G,
            CELL_GROUPS=CELL_GROUPS,
        )
    while deferred_cells > 0:
        # A zero that the compiler does not know to be one: n (n + 1) is even. Without it, all
        # addresses would be computed before the loop and kept in registers.
        hidden_zero = deferred_cells * (deferred_cells + 1) & 1
        group = tl.reshape(cell[:, None] * CELL_GROUPS + tl.arange(0, CELL_GROUPS)[None, :], (G,))
        quantize_tile(
            W_ptr=W_ptr,
            codes_ptr=codes_ptr,
            scale_ptr=scale_ptr,
            zero_ptr=zero_ptr,
            not_finite_ptr=not_finite_ptr,
            unit_index=unit_index,
            group=group,
            cell=cell,
            groups=groups,
            row_stride=row_stride.to(tl.int64) * STRIDE_DIVISOR,
            units=units + hidden_zero,
            units_again=units_again + hidden_zero,
            SHRINKS=True,
            TILE=TILE,
        )
        tl.debug_barrier()  # the scales that were just stored are loaded next
        cell, deferred_cells = _find_deferred(
            unit_scale_ptr=unit_scale_ptr,
            first_cell=first_cell,
            groups=groups,
            G=G,
            CELL_GROUPS=CELL_GROUPS,
        )


@triton.jit
def _any_deferred(unit_scale_ptr, first_group, groups, COUNT: tl.constexpr):
    """Return 1 if any of COUNT groups is deferred, otherwise 0."""
    group = first_group + tl.arange(0, COUNT)
    scale = tl.load(unit_scale_ptr + group, group < groups, 0.0)
    return tl.max((scale.to(tl.float32) == DEFERRED).to(tl.int32), 0)


@triton.jit
def _find_deferred(unit_scale_ptr, first_cell, groups, G: tl.constexpr, CELL_GROUPS: tl.constexpr):
    """Find the cells with a deferred group, among those of SEARCHED_TILES tiles.

    Returns:
        cells: Numbers of the first G / CELL_GROUPS of them. If fewer are found, the remaining slots
            contain the number of cells in a unit, with which no cell is numbered.
        count: The number of all of them.
    """
    slot = tl.arange(0, G // CELL_GROUPS)
    cells = tl.zeros((G // CELL_GROUPS,), tl.int32) + tl.cdiv(groups, CELL_GROUPS)
    count = 0
    for i in range(SEARCHED_TILES):
        # The cells of tile i, and whether each has a deferred group.
        cell = first_cell + i * (G // CELL_GROUPS) + slot
        group = cell[:, None] * CELL_GROUPS + tl.arange(0, CELL_GROUPS)[None, :]
        scale = tl.load(unit_scale_ptr + group, group < groups, 0.0)
        deferred = tl.max((scale.to(tl.float32) == DEFERRED).to(tl.int32), 1)
        # Count the deferred cells: slot j takes the cell with rank j. Triton cannot scatter, so
        # every slot takes the minimum over the cells of this tile that are its own.
        rank = count + tl.cumsum(deferred, 0) - deferred
        is_own = (deferred > 0)[:, None] & (rank[:, None] == slot[None, :])
        cells = tl.minimum(cells, tl.min(tl.where(is_own, cell[:, None], groups), 0))
        count += tl.sum(deferred, 0)
    return cells, count
