"""A tile of groups on its way through the fused quantizer, from weights to packed codes."""

import triton
import triton.language as tl

from hqqtrain_kernels.hqq_triton import hqq
from hqqtrain_kernels.least_squares_triton import least_squares
from hqqtrain_kernels.pack_triton import store_packed
from hqqtrain_kernels.solve_triton import (
    code_index,
    encode,
    largest,
    least,
    load,
    power_of_two,
    reciprocal,
    spread_out,
    stored,
)

REST = tl.constexpr(-1.0)
"""In the place of a scale: the group is left to the second launch."""


@triton.jit
def quantize_tile(
    W_ptr, codes_ptr, scale_ptr, zero_ptr, bad_ptr, unit_index, n, place, groups, row_stride,
    units, units_again, LAST: tl.constexpr,
    AXIS: tl.constexpr, NBITS: tl.constexpr, g: tl.constexpr, CELL: tl.constexpr,
    TILES: tl.constexpr, ROW: tl.constexpr, PACKS: tl.constexpr, SOLVER: tl.constexpr,
    NUMBERS: tl.constexpr, LARGEST: tl.constexpr, LEAST: tl.constexpr, R: tl.constexpr,
    G: tl.constexpr, T: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Groups n [G] of a unit, from weights to packed codes; `place`: see `store_packed`."""
    TOP: tl.constexpr = 2**NBITS - 1
    origin = unit_index * row_stride + n.to(tl.int64) * (g if AXIS == 1 else 1)
    tile = (W_ptr, origin, n < groups, units * row_stride)
    k = code_index(tl.arange(0, R)[:, None, None, None], R, T, E)
    inside = None
    if g != R * T * E:
        inside = k < g
    W = load(tile, k, g, AXIS, "evict_last")
    high, low = W, W
    if inside is not None:
        high, low = tl.where(inside, W, float("-inf")), tl.where(inside, W, float("inf"))
    high, low = largest(high), least(low)
    size = tl.maximum(tl.abs(high), tl.abs(low))
    finite = (size < float("inf")) & (low == low)
    if tl.min(finite.to(tl.int32), 0) == 0:
        tl.store(bad_ptr, 1)
    unit = tl.where(size == 0, 1.0, power_of_two(size))
    shrink = reciprocal(unit)
    W, high, low = W * spread_out(shrink), high * shrink, low * shrink
    dtype: tl.constexpr = scale_ptr.dtype.element_ty
    rest = None
    if SOLVER == "rtn":
        scale = tl.maximum(high - low, 2.0**-30) * (1 / TOP)
        zero = tl.div_rn(-low, scale)
    elif SOLVER == "hqq":
        scale, zero, rest = hqq(
            W, inside, low, high, unit, tile, LAST, g, R, T, E, AXIS, NUMBERS, NBITS, TOP
        )
    else:
        scale, zero = least_squares(
            W, inside, low, high, unit, g, NUMBERS, TOP, LEAST, LARGEST, dtype
        )
    scale, zero = stored(scale, zero, unit, LEAST, LARGEST, dtype)
    whole, _ = stored(tl.full(zero.shape, 1.0, tl.float32), zero, unit, LEAST, LARGEST, dtype)
    constant = high == low
    scale = tl.where(constant, whole, scale)
    zero = tl.where(constant, -tl.div_rn(low, tl.div_rn(whole, unit)), zero)
    scale, zero = stored(tl.div_rn(scale, unit), zero, unit, LEAST, LARGEST, dtype)
    inverse = tl.where(constant, 0.0, tl.div_rn(1.0, tl.div_rn(scale, unit)))
    if SOLVER != "rtn":
        # Read again, from the L2 cache: kept in registers meanwhile, W would leave no room there;
        # nor would its addresses, which is why `units` comes under two names.
        tile = (W_ptr, origin, n < groups, units_again * row_stride)
        W = load(tile, k, g, AXIS, "evict_first") * spread_out(shrink)
    codes = encode(W, inverse, tl.where(constant, 0.0, zero), NBITS)

    if rest is not None and not LAST:
        scale = tl.where(rest, REST, scale)
    meta = unit_index * groups + n
    tl.store(scale_ptr + meta, scale.to(dtype), n < groups)
    tl.store(zero_ptr + meta, zero.to(dtype), n < groups)
    if PACKS:
        codes = tl.reshape(tl.permute(codes, 1, 2, 0, 3), G * T * R * E // 8, 8)
        row = codes_ptr.to(tl.pointer_type(tl.int16)) + unit_index * ROW
        store_packed(codes, row, place, groups * (g // 8), CELL * g, NBITS, TILES)
    else:
        at = spread_out(unit_index * ROW + n.to(tl.int64) * g) + k
        tl.store(codes_ptr + at, codes.to(tl.uint8), spread_out(n < groups) & (k < g))
