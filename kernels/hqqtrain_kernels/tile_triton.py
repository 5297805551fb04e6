"""One tile of groups in the fused quantizer, from weights to packed codes.

`solve_triton` explains the tile [R, G, T, E] and "normalized"; `pack_triton` explains cell, chunk,
plane and packed tile.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from hqqtrain_kernels.hqq_triton import hqq
from hqqtrain_kernels.least_squares_triton import least_squares
from hqqtrain_kernels.pack_triton import store_packed
from hqqtrain_kernels.solve_triton import (
    as_stored,
    code_index,
    encode,
    group_max,
    group_min,
    load_weights,
    per_group,
    power_of_two,
    reciprocal,
)
from hqqtrain_kernels.solver_params import SolverParams

DEFERRED = tl.constexpr(-1.0)
"""Stored in place of a scale, it marks a group for the second launch. No scale is negative."""


class TileConfig(NamedTuple):
    """The constants of a quantizing kernel, as one constexpr.

    Attributes:
        axis: Axis of the groups.
        nbits: Bits of a code.
        group_size: Weights of a group.
        cell_groups: Groups of a cell, which fill whole packed tiles.
        low_plane_tiles: Packed tiles of the low plane of a unit.
        unit_length: Elements that are stored for a unit: halfwords if `packs`, otherwise codes.
        packs: Whether the kernel packs the codes.
        solver: Name of the solver.
        params: Its parameters, of a type in `solver_params`.
        meta_min: Smallest scale that is stored.
        meta_max: Largest number of the dtype of scale and zero.
        R: Runs of E adjacent codes that a thread has of a group.
        G: Groups of the tile.
        T: Threads that share a group.
        E: Adjacent codes of a thread.
    """

    axis: int
    nbits: int
    group_size: int
    cell_groups: int
    low_plane_tiles: int
    unit_length: int
    packs: bool
    solver: str
    params: SolverParams
    meta_min: float
    meta_max: float
    R: int
    G: int
    T: int
    E: int


@triton.jit
def quantize_tile(
    W_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    not_finite_ptr,
    unit_index,
    group,
    cell,
    groups,
    row_stride,
    units,
    units_again,
    SHRINKS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Quantize G groups of a unit.

    Args:
        W_ptr: The weight.
        codes_ptr: Packed codes if `TILE.packs`, otherwise codes as bytes.
        scale_ptr: [units, groups]. Its dtype is META_DTYPE, the dtype of scale and zero.
        zero_ptr: [units, groups].
        not_finite_ptr: Set to 1 if a group holds NaN or infinity.
        unit_index: Number of the unit, int64.
        group: Numbers [G] of the groups in the unit. Those from `groups` on do not exist.
        cell: Where packed codes are stored: see `store_packed`.
        groups: Groups of a unit.
        row_stride: Elements between the rows of W, int64.
        units: Units of the weight. For axis 0, the weights of a group are this many rows apart.
        units_again: The same number as `units`. Step 4 says why.
        SHRINKS: Whether hqq's shrinkage is computed. Without it, groups that need it are deferred.
        TILE: The constants, a `TileConfig`.
    """
    NBITS: tl.constexpr = TILE.nbits
    GROUP_SIZE: tl.constexpr = TILE.group_size
    UNIT_LENGTH: tl.constexpr = TILE.unit_length
    SOLVER: tl.constexpr = TILE.solver
    META_DTYPE: tl.constexpr = scale_ptr.dtype.element_ty
    MAX_CODE: tl.constexpr = 2**NBITS - 1
    R: tl.constexpr = TILE.R
    G: tl.constexpr = TILE.G
    T: tl.constexpr = TILE.T
    E: tl.constexpr = TILE.E
    # 1. Load the groups and normalize them: divide each by its magnitude, a power of two. The
    #    division is exact, and from here on neither huge weights overflow nor tiny ones underflow.
    origin = unit_index * row_stride + group.to(tl.int64) * (GROUP_SIZE if TILE.axis == 1 else 1)
    exists = group < groups
    stride = units * row_stride
    k = code_index(tl.arange(0, R)[:, None, None, None], R, T, E)
    mask = None
    if GROUP_SIZE != R * T * E:
        mask = k < GROUP_SIZE
    W = load_weights(
        W_ptr=W_ptr,
        origin=origin,
        exists=exists,
        stride=stride,
        k=k,
        EVICTION="evict_last",
        TILE=TILE,
    )
    high, low = W, W
    if mask is not None:
        high, low = tl.where(mask, W, float("-inf")), tl.where(mask, W, float("inf"))
    high, low = group_max(high), group_min(low)
    size = tl.maximum(tl.abs(high), tl.abs(low))
    finite = (size < float("inf")) & (low == low)
    if tl.min(finite.to(tl.int32), 0) == 0:
        tl.store(not_finite_ptr, 1)
    magnitude = tl.where(size == 0, 1.0, power_of_two(size))
    inverse_magnitude = reciprocal(magnitude)
    W = W * per_group(inverse_magnitude)
    high = high * inverse_magnitude
    low = low * inverse_magnitude

    # 2. Solve for the normalized scale and the zero.
    deferred = None
    if SOLVER == "rtn":
        scale = tl.maximum(high - low, 2.0**-30) * (1 / MAX_CODE)
        zero = tl.div_rn(-low, scale)
    elif SOLVER == "hqq":
        scale, zero, deferred = hqq(
            W=W,
            mask=mask,
            low=low,
            high=high,
            magnitude=magnitude,
            W_ptr=W_ptr,
            origin=origin,
            exists=exists,
            stride=stride,
            SHRINKS=SHRINKS,
            TILE=TILE,
        )
    elif SOLVER == "least_squares":
        scale, zero = least_squares(
            W=W,
            mask=mask,
            low=low,
            high=high,
            magnitude=magnitude,
            META_DTYPE=META_DTYPE,
            TILE=TILE,
        )
    else:
        tl.static_assert(False, "this solver has no kernel: see solver_params.SUPPORTED_SOLVERS")

    # 3. Round scale and zero as they will be stored, because the codes must be the nearest ones for
    #    the stored values. A group of one constant c gets code 0 and a power of two as its scale,
    #    so that (0 - zero) * scale equals c exactly if the dtype of zero can represent c.
    scale, zero = as_stored(
        scale=scale, zero=zero, magnitude=magnitude, META_DTYPE=META_DTYPE, TILE=TILE
    )
    one = tl.full(zero.shape, 1.0, tl.float32)
    constant_scale, _ = as_stored(
        scale=one, zero=zero, magnitude=magnitude, META_DTYPE=META_DTYPE, TILE=TILE
    )
    is_constant = high == low
    scale = tl.where(is_constant, constant_scale, scale)
    zero = tl.where(is_constant, -tl.div_rn(low, tl.div_rn(constant_scale, magnitude)), zero)
    scale, zero = as_stored(
        scale=tl.div_rn(scale, magnitude),
        zero=zero,
        magnitude=magnitude,
        META_DTYPE=META_DTYPE,
        TILE=TILE,
    )
    inverse_scale = tl.where(is_constant, 0.0, tl.div_rn(1.0, tl.div_rn(scale, magnitude)))

    # 4. Encode.
    if SOLVER != "rtn":
        # Load W again, from the L2 cache. If it stayed in registers, too few would be left for the
        # solver. The same is true of its addresses, which the compiler would keep if it knew that
        # both loads use the same ones: `units` and `units_again` hide this.
        stride = units_again * row_stride
        W = load_weights(
            W_ptr=W_ptr,
            origin=origin,
            exists=exists,
            stride=stride,
            k=k,
            EVICTION="evict_first",
            TILE=TILE,
        )
        W = W * per_group(inverse_magnitude)
    codes = encode(
        W, inverse_scale=inverse_scale, zero=tl.where(is_constant, 0.0, zero), NBITS=NBITS
    )

    # 5. Store.
    if deferred is not None and not SHRINKS:
        scale = tl.where(deferred, DEFERRED, scale)
    offset = unit_index * groups + group
    tl.store(scale_ptr + offset, scale.to(META_DTYPE), exists)
    tl.store(zero_ptr + offset, zero.to(META_DTYPE), exists)
    if TILE.packs:
        # Bring the codes into the order of the unit (group, t, r, e), as chunks of 8.
        codes = tl.reshape(tl.permute(codes, 1, 2, 0, 3), G * T * R * E // 8, 8)
        unit_ptr = codes_ptr.to(tl.pointer_type(tl.int16)) + unit_index * UNIT_LENGTH
        chunks = groups * (GROUP_SIZE // 8)
        store_packed(
            codes=codes,
            unit_ptr=unit_ptr,
            cell=cell,
            chunks=chunks,
            CELL_CODES=TILE.cell_groups * GROUP_SIZE,
            NBITS=NBITS,
            LOW_PLANE_TILES=TILE.low_plane_tiles,
        )
    else:
        code_offset = per_group(unit_index * UNIT_LENGTH + group.to(tl.int64) * GROUP_SIZE) + k
        tl.store(codes_ptr + code_offset, codes.to(tl.uint8), per_group(exists) & (k < GROUP_SIZE))
