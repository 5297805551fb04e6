"""The least-squares solver on a tile of groups: `hqqtrain.quant.solvers.least_squares` explains it."""

import triton
import triton.language as tl

from hqqtrain_kernels.solve_triton import (
    MAGIC,
    MAGIC_BITS,
    clamped,
    in_fixed_point,
    largest,
    over_codes,
    spread_out,
    stored,
    within,
)

SHIFT = tl.constexpr(1 << 15)
"""Added to the magic number: see `_sums`."""
UNDO = tl.constexpr(pow(2 * (0x4B400000 + (1 << 15)) >> 16, -1, 1 << 16))


@triton.jit
def least_squares(
    W, inside, low, high, unit, g: tl.constexpr, NUMBERS: tl.constexpr, TOP: tl.constexpr,
    LEAST: tl.constexpr, LARGEST: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Scale (in units) and zero [G] of a tile W in units.

    One loop for all starts and for the last descent keeps the code small: unrolled, its 18 rounds
    would not fit the instruction cache.
    """
    SHARES: tl.constexpr = NUMBERS[0]
    SHARES_ABOUT_MEAN: tl.constexpr = NUMBERS[1]
    ROUNDS: tl.constexpr = NUMBERS[2]
    LAST_ROUNDS: tl.constexpr = NUMBERS[3]
    STRIDE: tl.constexpr = NUMBERS[4]
    BITS: tl.constexpr = NUMBERS[5]
    x, bits, total, mean, step = in_fixed_point(W, inside, low, high, g, BITS)
    total = total.to(tl.int32)
    centre = (total.to(tl.float32) * (1 / g) + MAGIC).to(tl.int32, bitcast=True) - MAGIC_BITS
    rest = total - g * centre
    x = within(x - spread_out(centre + bits), inside)
    v = x.to(tl.float32)
    bottom, top = -centre.to(tl.float32), largest(v)
    width = tl.maximum(top - bottom, 1.0)
    middle = bottom + width * 0.5
    reach = tl.maximum(tl.maximum(top, -bottom), 1.0) * 2

    best_gain = tl.full(rest.shape, float("-inf"), tl.float32)
    best_slope = tl.full(rest.shape, 1.0, tl.float32)
    best_offset, best_zero = best_slope, best_slope
    STARTS: tl.constexpr = len(SHARES) + len(SHARES_ABOUT_MEAN)
    for start in range(STARTS + 1):
        slope, offset = best_slope, best_offset
        for i in tl.static_range(len(SHARES)):
            steep = tl.div_rn(1.0, width * SHARES[i])
            slope = tl.where(start == i, steep, slope)
            offset = tl.where(start == i, 0.5 - middle * steep, offset)
        for i in tl.static_range(len(SHARES_ABOUT_MEAN)):
            steep = tl.div_rn(1.0, reach * SHARES_ABOUT_MEAN[i])
            slope = tl.where(start == len(SHARES) + i, steep, slope)
            offset = tl.where(start == len(SHARES) + i, 0.5, offset)
        variance, covariance, fitted, level, zero = _fit(v, x, inside, slope, offset, rest, g, TOP)
        rounds = tl.where(start == STARTS, LAST_ROUNDS, ROUNDS)
        for _ in range(1, rounds):
            moved = slope + STRIDE * (fitted - slope)
            slope = tl.where(moved > 0, moved, fitted)
            offset = offset + STRIDE * (level - offset)
            variance, covariance, fitted, level, zero = _fit(
                v, x, inside, slope, offset, rest, g, TOP
            )
        fits = (covariance > 0) & (variance > 0)
        gain = tl.where(fits, covariance * tl.div_rn(covariance, variance), 0.0)
        wins = gain > best_gain
        best_gain = tl.where(wins, gain, best_gain)
        best_slope = tl.where(wins, fitted, best_slope)
        best_offset = tl.where(wins, level, best_offset)
        best_zero = tl.where(wins, zero, best_zero)
    scale = tl.div_rn(step, best_slope * TOP)
    scale, _ = stored(scale, best_zero - tl.div_rn(mean, scale), unit, LEAST, LARGEST, dtype)
    scale = tl.div_rn(scale, unit)
    return scale, best_zero - tl.div_rn(mean, scale)


@triton.jit
def _fit(v, x, inside, slope, offset, rest, g: tl.constexpr, TOP: tl.constexpr):
    """The regression on the nearest codes, all [G]: variance and covariance (times g), slope,
    offset, mean code."""
    place = clamped(tl.fma(v, spread_out(slope), spread_out(offset)), 0.0, 1.0)
    codes = tl.fma(place, TOP * 1.0, MAGIC + SHIFT).to(tl.int32, bitcast=True)
    n, squares, products = _sums(within(codes, inside), x, inside, rest, g, TOP)
    if TOP * g < 46341:  # whose square is 2**31
        variance = (squares * g - n * n).to(tl.float32)
    else:
        variance = (squares.to(tl.int64) * g - n.to(tl.int64) * n).to(tl.float32)
    covariance = products.to(tl.float32) * g - (n * rest).to(tl.float32)
    fits = (covariance > 0) & (variance > 0)
    fitted = tl.where(fits, tl.div_rn(variance, covariance) * (1 / TOP), slope)
    mean_code = n.to(tl.float32) * (1 / g)
    level = mean_code * (1 / TOP) - (rest.to(tl.float32) * (1 / g)) * fitted
    return variance, covariance, fitted, level, mean_code


@triton.jit
def _sums(codes, x, inside, rest, g: tl.constexpr, TOP: tl.constexpr):
    """Over each group: of codes, of their squares, of codes times x.

    The codes q come as c = q + C, C the bits of the magic number. Modulo 2**32, where integers
    live, the sum of c * c is that of q * q, below 2**16, plus that of q times 2 C, a multiple of
    2**16 that can be undone: two sums for one instruction a weight, where five are all there are.
    """
    C: tl.constexpr = MAGIC_BITS + SHIFT
    if TOP * TOP * g < 65536:
        ALL: tl.constexpr = (g * C * C + 0x80000000) % 0x100000000 - 0x80000000
        both = over_codes(codes * codes) - ALL
        squares = both & 0xFFFF
        n = (((both >> 16) & 0xFFFF) * UNDO) & 0xFFFF
        products = over_codes(codes * x) - rest * C
    else:
        codes = within(codes - C, inside)
        n = over_codes(codes)
        squares = over_codes(codes * codes)
        products = codes * x
        if g > 256:
            products = products.to(tl.int64)
        products = over_codes(products)
    return n, squares, products
