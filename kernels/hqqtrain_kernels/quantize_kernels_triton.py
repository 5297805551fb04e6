"""The kernels of the fused quantizer, each program of which quantizes G groups at a time.

hqq's solver takes two launches. The first leaves out the few groups whose residuals shrink, because
that code needs 40 more registers, and marks them by a scale of DEFERRED. The second searches for
the marks and quantizes those groups.
"""

import triton
import triton.language as tl

from hqqtrain_kernels.tile_triton import DEFERRED, quantize_tile

SEARCHED_TILES = tl.constexpr(32)
"""Tiles of G groups that one program of the second launch searches.

The first launch leaves few groups to it, and none of most weights.
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

    row_stride is passed divided by STRIDE_DIVISOR and multiplied here: this way the compiler sees
    how far the rows of W are aligned, though integers are not specialized.
    """
    G: tl.constexpr = TILE.G
    CELL_GROUPS: tl.constexpr = TILE.cell_groups
    unit_index = (tl.program_id(0) // programs_per_unit).to(tl.int64)
    first = (tl.program_id(0) % programs_per_unit) * G
    quantize_tile(
        W_ptr=W_ptr,
        codes_ptr=codes_ptr,
        scale_ptr=scale_ptr,
        zero_ptr=zero_ptr,
        not_finite_ptr=not_finite_ptr,
        unit_index=unit_index,
        group=first + tl.arange(0, G),
        cell=first // CELL_GROUPS,
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
    """Quantize the groups that `quantize_kernel` deferred, of SEARCHED_TILES * G, G at a time.

    Whole cells are quantized again, the finished groups in them too. A cell fills whole tiles of
    packed codes, so it can be stored without the others.
    """
    G: tl.constexpr = TILE.G
    CELL_GROUPS: tl.constexpr = TILE.cell_groups
    unit_index = (tl.program_id(0) // programs_per_unit).to(tl.int64)
    first_cell = (tl.program_id(0) % programs_per_unit) * (SEARCHED_TILES * G // CELL_GROUPS)
    unit_scale_ptr = scale_ptr + unit_index * groups
    cell = tl.zeros((G // CELL_GROUPS,), tl.int32)
    # Mostly one look at all scales is enough: nothing is left.
    left = _any_deferred(
        unit_scale_ptr=unit_scale_ptr,
        first=first_cell * CELL_GROUPS,
        groups=groups,
        COUNT=SEARCHED_TILES * G,
    )
    if left > 0:
        cell, left = _find_deferred(
            unit_scale_ptr=unit_scale_ptr,
            first_cell=first_cell,
            groups=groups,
            G=G,
            CELL_GROUPS=CELL_GROUPS,
        )
    while left > 0:
        # A zero that the compiler cannot see. Without it, all addresses would be computed before
        # the loop and kept in registers.
        nothing = left * (left + 1) & 1
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
            units=units + nothing,
            units_again=units_again + nothing,
            SHRINKS=True,
            TILE=TILE,
        )
        tl.debug_barrier()  # the scales that were just stored are loaded next
        cell, left = _find_deferred(
            unit_scale_ptr=unit_scale_ptr,
            first_cell=first_cell,
            groups=groups,
            G=G,
            CELL_GROUPS=CELL_GROUPS,
        )


@triton.jit
def _any_deferred(unit_scale_ptr, first, groups, COUNT: tl.constexpr):
    """Return 1 if any of COUNT groups is deferred, otherwise 0."""
    n = first + tl.arange(0, COUNT)
    scale = tl.load(unit_scale_ptr + n, n < groups, 0.0)
    return tl.max((scale.to(tl.float32) == DEFERRED).to(tl.int32), 0)


@triton.jit
def _find_deferred(unit_scale_ptr, first_cell, groups, G: tl.constexpr, CELL_GROUPS: tl.constexpr):
    """Find cells with a deferred group.

    Returns:
        cells: The first G / CELL_GROUPS of them. If there are fewer, the others are the number of
            all cells, which does not exist as a cell.
        count: How many there are.
    """
    slot = tl.arange(0, G // CELL_GROUPS)
    cells = tl.zeros((G // CELL_GROUPS,), tl.int32) + tl.cdiv(groups, CELL_GROUPS)
    count = 0
    for i in range(SEARCHED_TILES):
        # The cells of tile i, and whether each has a deferred group.
        cell = first_cell + i * (G // CELL_GROUPS) + slot
        at = cell[:, None] * CELL_GROUPS + tl.arange(0, CELL_GROUPS)[None, :]
        scale = tl.load(unit_scale_ptr + at, at < groups, 0.0)
        deferred = tl.max((scale.to(tl.float32) == DEFERRED).to(tl.int32), 1)
        # The number of each found cell among all that are found; slot j takes number j.
        number = count + tl.cumsum(deferred, 0) - deferred
        found = (deferred > 0)[:, None] & (number[:, None] == slot[None, :])
        cells = tl.minimum(cells, tl.min(tl.where(found, cell[:, None], groups), 0))
        count += tl.sum(deferred, 0)
    return cells, count
