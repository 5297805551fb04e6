"""The least-squares solver on a tile of groups.

`hqqtrain/quant/solvers/least_squares.py` explains the algorithm, and `solve_triton` the tile.
"""

import triton
import triton.language as tl

from hqqtrain_kernels.solve_triton import (
    MAGIC,
    MAGIC_BITS,
    as_stored,
    clamp,
    group_max,
    group_sum,
    mask_padding,
    per_group,
    to_fixed_point,
)

CODE_SHIFT = tl.constexpr(1 << 15)
"""Added to MAGIC when codes are rounded. It makes the factor odd that `_code_sums` must invert."""
INVERSE_FACTOR = tl.constexpr(pow(2 * (0x4B400000 + (1 << 15)) >> 16, -1, 1 << 16))
"""Inverse modulo 2**16 of 2 * (MAGIC_BITS + CODE_SHIFT) / 2**16: see `_code_sums`."""


@triton.jit
def least_squares(
    W,
    mask,
    low,
    high,
    magnitude,
    META_DTYPE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Fit scale and zero of every group of a tile.

    One loop serves all starting points and the last descent, to keep the code small. Unrolled, its
    20 rounds would not fit into the instruction cache.

    Args:
        W: The tile, normalized.
        mask: Which elements of the tile are codes, or None if all are.
        low: Minimum of each group, [G], normalized.
        high: Maximum of each group, [G], normalized.
        magnitude: Power of two that each group was divided by, [G].
        META_DTYPE: Storage dtype of scale and zero.
        TILE: `tile_triton.TileConfig`. Its params are `LeastSquaresParams`.

    Returns:
        The scale, normalized, and the zero: both [G].
    """
    PARAMS: tl.constexpr = TILE.params
    GROUP_SIZE: tl.constexpr = TILE.group_size
    MAX_CODE: tl.constexpr = 2**TILE.nbits - 1
    ABOUT_MIDDLE: tl.constexpr = PARAMS.ranges_about_middle
    ABOUT_MEAN: tl.constexpr = PARAMS.ranges_about_mean
    ROUNDS: tl.constexpr = PARAMS.rounds
    LAST_ROUNDS: tl.constexpr = PARAMS.last_rounds
    RELAXATION: tl.constexpr = PARAMS.relaxation
    BITS: tl.constexpr = PARAMS.bits
    # Convert to integers x, centered on their rounded mean; v is x as fp32. v_sum, the sum of x,
    # is not 0, because the center is rounded.
    x, magic_bits, total, mean, step = to_fixed_point(
        W=W, mask=mask, low=low, high=high, GROUP_SIZE=GROUP_SIZE, BITS=BITS
    )
    total = total.to(tl.int32)
    center = (total.to(tl.float32) * (1 / GROUP_SIZE) + MAGIC).to(tl.int32, bitcast=True)
    center = center - MAGIC_BITS
    v_sum = total - GROUP_SIZE * center
    x = mask_padding(x - per_group(center + magic_bits), mask)
    v = x.to(tl.float32)
    low_v, high_v = -center.to(tl.float32), group_max(v)
    value_range = tl.maximum(high_v - low_v, 1.0)
    middle = low_v + value_range * 0.5
    symmetric_range = tl.maximum(tl.maximum(high_v, -low_v), 1.0) * 2

    # A line maps v to its place among the codes: v * slope + offset is 0 at the lowest code and 1
    # at the highest. Every group keeps the line that removes most of its squared error.
    best_gain = tl.full(v_sum.shape, float("-inf"), tl.float32)
    best_slope = tl.full(v_sum.shape, 1.0, tl.float32)
    best_offset, best_mean_code = best_slope, best_slope
    STARTS: tl.constexpr = len(ABOUT_MIDDLE) + len(ABOUT_MEAN)
    for start in range(STARTS + 1):
        # 1. Select the starting line. The last pass continues from the best line so far.
        slope, offset = best_slope, best_offset
        for i in tl.static_range(len(ABOUT_MIDDLE)):
            start_slope = tl.div_rn(1.0, value_range * ABOUT_MIDDLE[i])
            slope = tl.where(start == i, start_slope, slope)
            offset = tl.where(start == i, 0.5 - middle * start_slope, offset)
        for i in tl.static_range(len(ABOUT_MEAN)):
            start_slope = tl.div_rn(1.0, symmetric_range * ABOUT_MEAN[i])
            slope = tl.where(start == len(ABOUT_MIDDLE) + i, start_slope, slope)
            offset = tl.where(start == len(ABOUT_MIDDLE) + i, 0.5, offset)
        # 2. Descend: round to codes, regress on the codes, and step RELAXATION times as far as the
        #    regression proposes. A slope that would turn negative takes the regression's own value.
        variance, covariance, fitted_slope, fitted_offset, mean_code = _fit(
            v=v,
            x=x,
            mask=mask,
            slope=slope,
            offset=offset,
            v_sum=v_sum,
            GROUP_SIZE=GROUP_SIZE,
            MAX_CODE=MAX_CODE,
        )
        rounds = tl.where(start == STARTS, LAST_ROUNDS, ROUNDS)
        for _ in range(1, rounds):
            relaxed_slope = slope + RELAXATION * (fitted_slope - slope)
            slope = tl.where(relaxed_slope > 0, relaxed_slope, fitted_slope)
            offset = offset + RELAXATION * (fitted_offset - offset)
            variance, covariance, fitted_slope, fitted_offset, mean_code = _fit(
                v=v,
                x=x,
                mask=mask,
                slope=slope,
                offset=offset,
                v_sum=v_sum,
                GROUP_SIZE=GROUP_SIZE,
                MAX_CODE=MAX_CODE,
            )
        # 3. Keep the last fit, a plain regression, in the groups where it is best.
        is_valid = (covariance > 0) & (variance > 0)
        gain = tl.where(is_valid, covariance * tl.div_rn(covariance, variance), 0.0)
        is_better = gain > best_gain
        best_gain = tl.where(is_better, gain, best_gain)
        best_slope = tl.where(is_better, fitted_slope, best_slope)
        best_offset = tl.where(is_better, fitted_offset, best_offset)
        best_mean_code = tl.where(is_better, mean_code, best_mean_code)
    # (mean_code - zero) * scale is the mean of the group. Round the scale to its storage dtype
    # first, so that the zero compensates for the rounding.
    scale = tl.div_rn(step, best_slope * MAX_CODE)
    zero = best_mean_code - tl.div_rn(mean, scale)
    scale, _ = as_stored(
        scale=scale, zero=zero, magnitude=magnitude, META_DTYPE=META_DTYPE, TILE=TILE
    )
    scale = tl.div_rn(scale, magnitude)
    return scale, best_mean_code - tl.div_rn(mean, scale)


@triton.jit
def _fit(v, x, mask, slope, offset, v_sum, GROUP_SIZE: tl.constexpr, MAX_CODE: tl.constexpr):
    """Round the weights to codes, and regress the weights on these codes.

    Returns:
        variance: Variance of the codes, times the square of the group size.
        covariance: Covariance of codes and weights, times the same.
        slope, offset: The regression's line. The slope is the old one where no line fits.
        mean_code: Mean of the codes.

        All are fp32 [G].
    """
    # Nearest codes. The fused multiply-add rounds the place once, and adding MAGIC rounds the code.
    place = clamp(tl.fma(v, per_group(slope), per_group(offset)), 0.0, 1.0)
    codes = tl.fma(place, MAX_CODE * 1.0, MAGIC + CODE_SHIFT).to(tl.int32, bitcast=True)
    codes = mask_padding(codes, mask)
    code_sum, squares, products = _code_sums(
        codes=codes, x=x, mask=mask, v_sum=v_sum, GROUP_SIZE=GROUP_SIZE, MAX_CODE=MAX_CODE
    )
    # Exact integers, rounded to fp32 at the end. They fit 32 bits if the sum of the codes, at most
    # MAX_CODE * GROUP_SIZE, has a square below 2**31.
    if MAX_CODE * GROUP_SIZE < 46341:
        variance = (squares * GROUP_SIZE - code_sum * code_sum).to(tl.float32)
    else:
        square = code_sum.to(tl.int64) * code_sum
        variance = (squares.to(tl.int64) * GROUP_SIZE - square).to(tl.float32)
    covariance = products.to(tl.float32) * GROUP_SIZE - (code_sum * v_sum).to(tl.float32)
    # If all codes are equal or fall with the weights, no line fits: keep the slope.
    is_valid = (covariance > 0) & (variance > 0)
    slope = tl.where(is_valid, tl.div_rn(variance, covariance) * (1 / MAX_CODE), slope)
    mean_code = code_sum.to(tl.float32) * (1 / GROUP_SIZE)
    v_mean = v_sum.to(tl.float32) * (1 / GROUP_SIZE)
    return variance, covariance, slope, mean_code * (1 / MAX_CODE) - v_mean * slope, mean_code


@triton.jit
def _code_sums(codes, x, mask, v_sum, GROUP_SIZE: tl.constexpr, MAX_CODE: tl.constexpr):
    """Return three sums over each group: the codes, their squares, and codes times x; int32 [G].

    For large groups, the products are int64. The codes q are passed as c = q + C, where
    C = MAGIC_BITS + CODE_SHIFT. If the sum of the squares is below 2**16, one sum yields the first
    two results: modulo 2**32, in which int32 computes, the sum of c * c is

        sum(q * q) + 2 C sum(q) + GROUP_SIZE C * C.

    The last term is known. The first is below 2**16, and the second is a multiple of 2**16, because
    2 C = F * 2**16. The high half is therefore F * sum(q) modulo 2**16. F is odd, so it has an
    inverse modulo 2**16, INVERSE_FACTOR, which leaves sum(q). This saves one of the instructions
    per weight, of which a round has only five.
    """
    C: tl.constexpr = MAGIC_BITS + CODE_SHIFT
    if MAX_CODE * MAX_CODE * GROUP_SIZE < 65536:
        C_SQUARES: tl.constexpr = (GROUP_SIZE * C * C + 0x80000000) % 0x100000000 - 0x80000000
        two_sums = group_sum(codes * codes) - C_SQUARES
        squares = two_sums & 0xFFFF
        code_sum = (((two_sums >> 16) & 0xFFFF) * INVERSE_FACTOR) & 0xFFFF
        products = group_sum(codes * x) - v_sum * C
    else:
        codes = mask_padding(codes - C, mask)
        code_sum = group_sum(codes)
        squares = group_sum(codes * codes)
        products = codes * x
        if GROUP_SIZE > 256:
            products = products.to(tl.int64)
        products = group_sum(products)
    return code_sum, squares, products
