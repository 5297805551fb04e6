"""A tile of groups on its way through the fused quantizer: from weights to packed codes."""

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

DEFERRED = tl.constexpr(-1.0)
"""Stored in place of a scale: the group is left to the second launch."""


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
    AXIS: tl.constexpr,
    NBITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    CELL_GROUPS: tl.constexpr,
    PLANE_TILES: tl.constexpr,
    UNIT_LENGTH: tl.constexpr,
    PACKS: tl.constexpr,
    SOLVER: tl.constexpr,
    PARAMS: tl.constexpr,
    META_MIN: tl.constexpr,
    META_MAX: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    T: tl.constexpr,
    E: tl.constexpr,
):
    """Quantize G groups of a unit. `solve_triton` explains the tile [R, G, T, E].

    Args:
        W_ptr: The weight.
        codes_ptr: Packed codes if PACKS, otherwise codes as bytes.
        scale_ptr: [units, groups]. Its dtype is META_DTYPE, the dtype of scale and zero.
        zero_ptr: [units, groups].
        not_finite_ptr: Set to 1 if a group holds NaN or infinity.
        unit_index: Number of the unit, int64.
        group: Numbers [G] of the groups in the unit. Those from `groups` on do not exist.
        cell: Where packed codes are stored: see `store_packed`.
        groups: Groups of a unit.
        row_stride: Distance between the rows of W, int64.
        units: Units of the weight. For axis 0, the weights of a group are this many rows apart.
        units_again: The same number.
        SHRINKS: Whether hqq's shrinkage is computed. Without it, groups that need it are deferred.
        AXIS: Axis of the groups.
        NBITS: Bits of a code.
        GROUP_SIZE: Weights of a group.
        CELL_GROUPS: Groups that fill whole tiles of packed codes.
        PLANE_TILES: Tiles of the low plane of a unit.
        UNIT_LENGTH: Halfwords of a unit if PACKS, otherwise its codes.
        PACKS: Whether the kernel packs the codes.
        SOLVER: Name of the solver.
        PARAMS: Its parameters, of a type in `solver_params`.
        META_MIN: Smallest scale that is stored.
        META_MAX: Largest number of META_DTYPE.
        R: Places of a thread along the tile's first dimension.
        G: Groups of the tile.
        T: Threads that share a group.
        E: Adjacent codes of a thread.
    """
    MAX_CODE: tl.constexpr = 2**NBITS - 1
    # 1. Load the groups, and divide each by its unit, a power of two: exact, and neither huge nor
    #    tiny weights overflow or underflow from here on.
    origin = unit_index * row_stride + group.to(tl.int64) * (GROUP_SIZE if AXIS == 1 else 1)
    exists = group < groups
    stride = units * row_stride
    k = code_index(tl.arange(0, R)[:, None, None, None], R, T, E)
    mask = None
    if GROUP_SIZE != R * T * E:
        mask = k < GROUP_SIZE
    W = load_weights(W_ptr, origin, exists, stride, k, GROUP_SIZE, AXIS, "evict_last")
    high, low = W, W
    if mask is not None:
        high, low = tl.where(mask, W, float("-inf")), tl.where(mask, W, float("inf"))
    high, low = group_max(high), group_min(low)
    size = tl.maximum(tl.abs(high), tl.abs(low))
    finite = (size < float("inf")) & (low == low)
    if tl.min(finite.to(tl.int32), 0) == 0:
        tl.store(not_finite_ptr, 1)
    unit = tl.where(size == 0, 1.0, power_of_two(size))
    inverse_unit = reciprocal(unit)
    W, high, low = W * per_group(inverse_unit), high * inverse_unit, low * inverse_unit
    META_DTYPE: tl.constexpr = scale_ptr.dtype.element_ty

    # 2. Solve for scale (in units) and zero.
    deferred = None
    if SOLVER == "rtn":
        scale = tl.maximum(high - low, 2.0**-30) * (1 / MAX_CODE)
        zero = tl.div_rn(-low, scale)
    elif SOLVER == "hqq":
        scale, zero, deferred = hqq(
            W, mask, low, high, unit, W_ptr, origin, exists, stride, PARAMS, SHRINKS, GROUP_SIZE,
            R, T, E, AXIS, NBITS, MAX_CODE,
        )  # fmt: skip
    elif SOLVER == "least_squares":
        scale, zero = least_squares(
            W, mask, low, high, unit, PARAMS, GROUP_SIZE, MAX_CODE, META_MIN, META_MAX, META_DTYPE
        )
    else:
        tl.static_assert(False, "this solver has no kernel: see solver_params.SUPPORTED_SOLVERS")

    # 3. Round scale and zero as they will be stored; codes must be nearest with those. A constant
    #    group c is stored as (0 - zero) * scale with scale a power of two: exactly, where the dtype
    #    of zero holds c.
    scale, zero = as_stored(scale, zero, unit, META_MIN, META_MAX, META_DTYPE)
    one = tl.full(zero.shape, 1.0, tl.float32)
    whole, _ = as_stored(one, zero, unit, META_MIN, META_MAX, META_DTYPE)
    constant = high == low
    scale = tl.where(constant, whole, scale)
    zero = tl.where(constant, -tl.div_rn(low, tl.div_rn(whole, unit)), zero)
    scale, zero = as_stored(
        tl.div_rn(scale, unit), zero, unit, META_MIN, META_MAX, META_DTYPE
    )  # fmt: skip
    inverse_scale = tl.where(constant, 0.0, tl.div_rn(1.0, tl.div_rn(scale, unit)))

    # 4. Encode.
    if SOLVER != "rtn":
        # Load W again, from the L2 cache. Kept in registers meanwhile, it would leave too few for
        # the solver. So would its addresses: that is why `units` comes under two names, between
        # which the compiler sees no connection.
        stride = units_again * row_stride
        W = load_weights(W_ptr, origin, exists, stride, k, GROUP_SIZE, AXIS, "evict_first")
        W = W * per_group(inverse_unit)
    codes = encode(W, inverse_scale, tl.where(constant, 0.0, zero), NBITS)

    # 5. Store.
    if deferred is not None and not SHRINKS:
        scale = tl.where(deferred, DEFERRED, scale)
    meta = unit_index * groups + group
    tl.store(scale_ptr + meta, scale.to(META_DTYPE), exists)
    tl.store(zero_ptr + meta, zero.to(META_DTYPE), exists)
    if PACKS:
        # Chunks of 8 codes in the order of the unit: group, t, r, e.
        codes = tl.reshape(tl.permute(codes, 1, 2, 0, 3), G * T * R * E // 8, 8)
        row_ptr = codes_ptr.to(tl.pointer_type(tl.int16)) + unit_index * UNIT_LENGTH
        chunks = groups * (GROUP_SIZE // 8)
        store_packed(codes, row_ptr, cell, chunks, CELL_GROUPS * GROUP_SIZE, NBITS, PLANE_TILES)
    else:
        at = per_group(unit_index * UNIT_LENGTH + group.to(tl.int64) * GROUP_SIZE) + k
        tl.store(codes_ptr + at, codes.to(tl.uint8), per_group(exists) & (k < GROUP_SIZE))
