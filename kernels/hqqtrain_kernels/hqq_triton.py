"""hqq's solver on a tile of groups. `hqqtrain.quant.solvers.hqq.hqq` explains the algorithm."""

import triton
import triton.language as tl

from hqqtrain_kernels.solve_triton import (
    MAGIC_BITS,
    code_fractions,
    code_index,
    encode,
    group_sum,
    load_weights,
    mask_padding,
    nearest_codes,
    per_group,
    reciprocal,
    to_fixed_point,
)


@triton.jit
def hqq(
    W,
    mask,
    low,
    high,
    magnitude,
    W_ptr,
    origin,
    exists,
    stride,
    SHRINKS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Fit the zero of every group of a tile.

    Args:
        W: The tile, normalized.
        mask: Which elements of the tile are codes, or None if all are.
        low: Minimum of each group, [G], normalized.
        high: Maximum of each group, [G], normalized.
        magnitude: Power of two that each group was divided by, [G].
        W_ptr: The weight, from which `_sum_shrunk` loads the tile again.
        origin: Offset of the first weight of each group in W_ptr, [G].
        exists: Whether the group exists, [G].
        stride: Elements between the weights of a group, for axis 0.
        SHRINKS: Whether to compute hqq's shrinkage, which takes 40 more registers.
        TILE: `tile_triton.TileConfig`. Its params are `HQQParams`.

    Returns:
        scale: [G], normalized.
        zero: [G].
        deferred: [G], whether the residuals of a group are so large that they shrink. Without
            SHRINKS the scale and the zero of such a group are not valid.
    """
    PARAMS: tl.constexpr = TILE.params
    GROUP_SIZE: tl.constexpr = TILE.group_size
    NBITS: tl.constexpr = TILE.nbits
    MAX_CODE: tl.constexpr = 2**NBITS - 1
    ROUNDS: tl.constexpr = PARAMS.rounds
    BETA: tl.constexpr = PARAMS.beta
    P: tl.constexpr = PARAMS.p
    NUDGES: tl.constexpr = PARAMS.nudges
    BITS: tl.constexpr = PARAMS.bits
    SHRUNK_BITS: tl.constexpr = PARAMS.shrunk_bits
    # The codes span the group's range, except that 1 / scale is capped as in hqq.
    value_range = tl.maximum(high - low, 2.0**-30)
    inverse_scale = tl.div_rn(1.0, value_range) * MAX_CODE  # as torch divides a number by a tensor
    capped = tl.minimum(inverse_scale, magnitude * 2e4)
    inverse_scale = tl.where(value_range * magnitude <= 1e-4, inverse_scale, capped)
    initial_zero = -low * inverse_scale
    scale = tl.div_rn(1.0, inverse_scale)
    _, _, _, mean, _ = to_fixed_point(
        W=W, mask=mask, low=low, high=high, GROUP_SIZE=GROUP_SIZE, BITS=BITS
    )
    mean = mean * inverse_scale
    peak = high * inverse_scale
    encode_inverse = tl.div_rn(1.0, scale)
    # A residual (of the weight itself) below the threshold shrinks to exactly 0.
    THRESHOLD: tl.constexpr = BETA ** (-1 / (2 - P))
    deferred = tl.zeros(initial_zero.shape, tl.int1)
    best_zero = initial_zero
    least_error = tl.full(initial_zero.shape, float("inf"), tl.float64)
    # `nearest_codes` adds OFFSET to every code, so a group's sum contains GROUP_OFFSET, as int32.
    OFFSET: tl.constexpr = MAGIC_BITS - (NBITS << 23)
    GROUP_OFFSET: tl.constexpr = (GROUP_SIZE * OFFSET + 0x80000000) % 0x100000000 - 0x80000000
    fractions = code_fractions(W, inverse_scale, NBITS)
    TRIES: tl.constexpr = len(NUDGES) if NBITS == 1 else 1
    for i in tl.static_range(TRIES):
        # hqq begins with a whole zero at 4 bits.
        zero = initial_zero
        if NBITS == 4:
            zero = _round_half_even(initial_zero)
        rounds_left = ROUNDS
        _, clips = _any_moved_or_clips(
            zero=zero, previous=zero, nudge=NUDGES[i], peak=peak, MAX_CODE=MAX_CODE
        )
        while rounds_left > 0:
            previous = zero
            # Upper bound of the residuals, in codes: half a code or the distance that the zero has
            # moved, and 1 % for rounding.
            residual_bound = tl.maximum(tl.abs(zero - initial_zero), 0.5) * 1.01
            shrinks = residual_bound * (scale * magnitude) > THRESHOLD
            deferred = deferred | shrinks
            # The new zero is the mean of code - W / scale over the group. Clipping codes costs an
            # instruction a weight, so it is done only if the tile has a code beyond the last.
            if clips:
                code_sum = _sum_codes(
                    fractions=fractions, zero=zero + NUDGES[i], mask=mask, NBITS=NBITS, CLIPS=True
                )
            else:
                code_sum = _sum_codes(
                    fractions=fractions, zero=zero + NUDGES[i], mask=mask, NBITS=NBITS, CLIPS=False
                )
            zero = (code_sum - GROUP_OFFSET).to(tl.float32) * (1 / GROUP_SIZE) - mean
            if SHRINKS and tl.max(shrinks.to(tl.int32), 0) > 0:
                shrunk = _sum_shrunk(
                    W_ptr=W_ptr,
                    origin=origin,
                    exists=exists,
                    stride=stride,
                    zero=previous,
                    nudge=NUDGES[i],
                    inverse_scale=inverse_scale,
                    magnitude=magnitude,
                    THRESHOLD=THRESHOLD,
                    TILE=TILE,
                )
                zero = zero + shrunk.to(tl.float32) * (2.0**-SHRUNK_BITS / GROUP_SIZE)
            if NBITS == 1:
                # A later round can be worse: keep the best, by a margin above rounding errors.
                error = (
                    encode(W, inverse_scale=encode_inverse, zero=zero, NBITS=NBITS) - OFFSET
                ).to(tl.float32)
                error = (error - per_group(zero)) * per_group(scale) - W
                error = group_sum(mask_padding((error * error).to(tl.float64), mask))
                best_zero = tl.where(error < least_error * (1 - 1e-12), zero, best_zero)
                least_error = tl.minimum(error, least_error)
            moved, clips = _any_moved_or_clips(
                zero=zero, previous=previous, nudge=NUDGES[i], peak=peak, MAX_CODE=MAX_CODE
            )
            # Once no zero of the tile moves, further rounds would not move it either.
            rounds_left = tl.where(moved, rounds_left - 1, 0)
        if NBITS > 1:
            best_zero = zero
    return scale, best_zero, deferred


@triton.jit
def _sum_codes(fractions, zero, mask, NBITS: tl.constexpr, CLIPS: tl.constexpr):
    """Sum the nearest codes, with their offset, over every group.

    The caller has one branch with CLIPS and one without. The barrier keeps them separate: without
    it the compiler computes both sums in every round and then selects one, with 303 instructions
    for 64 weights instead of 190 (sm_90).
    """
    if CLIPS:
        tl.debug_barrier()
    return group_sum(
        mask_padding(nearest_codes(fractions, zero=zero, NBITS=NBITS, CLIPS=CLIPS), mask)
    )


@triton.jit
def _any_moved_or_clips(zero, previous, nudge, peak, MAX_CODE: tl.constexpr):
    """Whether the zero of any group of the tile moved, and whether any code will be clipped.

    One reduction over the warp answers both questions. `peak` is the largest W / scale of each
    group. It is rounded like every weight, so the second answer is exact. A safety margin would
    make it a needless yes in many rounds: at 4 bits, zeros begin as whole numbers, at which the
    peak can lie up to half a code beyond the last code, and then hardly move.
    """
    moved = (zero != previous).to(tl.int32)
    clips = (peak + (zero + nudge) >= MAX_CODE + 0.5).to(tl.int32)
    # Count both in the halves of one integer: a tile has at most 512 groups.
    counts = tl.sum(moved + (clips << 16), 0)
    return (counts & 0xFFFF) > 0, (counts >> 16) > 0


@triton.jit
def _round_half_even(x):
    """Round x of any size to whole numbers, half to even.

    From 2**23 = 8388608 on, every fp32 number is whole.
    """
    size = tl.abs(x)
    size = tl.where(size < 8388608.0, (size + 8388608.0) - 8388608.0, size)
    return tl.where(x < 0, -size, size)


@triton.jit
def _sum_shrunk(
    W_ptr,
    origin,
    exists,
    stride,
    zero,
    nudge,
    inverse_scale,
    magnitude,
    THRESHOLD: tl.constexpr,
    TILE: tl.constexpr,
):
    """Sum each group's residuals after hqq's shrinkage, in fixed point: [G] int64.

    The tile is loaded again, one index of its first dimension at a time. For the whole tile at
    once, the powers would take more registers than exist.
    """
    GROUP_SIZE: tl.constexpr = TILE.group_size
    NBITS: tl.constexpr = TILE.nbits
    BETA: tl.constexpr = TILE.params.beta
    P: tl.constexpr = TILE.params.p
    BITS: tl.constexpr = TILE.params.shrunk_bits
    R: tl.constexpr = TILE.R
    total = tl.zeros(zero.shape, tl.int64)
    # W and `decoded` are normalized; the threshold and the power are those of the weight itself.
    for r in range(R):
        k = code_index(r, R, TILE.T, TILE.E)
        W = load_weights(
            W_ptr=W_ptr,
            origin=origin,
            exists=exists,
            stride=stride,
            k=k,
            EVICTION="evict_first",
            TILE=TILE,
        )
        W = W * per_group(reciprocal(magnitude))
        codes = encode(W, inverse_scale=inverse_scale, zero=zero + nudge, NBITS=NBITS) - (
            MAGIC_BITS - (NBITS << 23)
        )
        decoded = tl.div_rn(codes.to(tl.float32) - per_group(zero), per_group(inverse_scale))
        residual = W - decoded
        size = tl.where(k < GROUP_SIZE, tl.abs(residual) * per_group(magnitude), 0.0)
        # Below the threshold all results are 0: skip the powers.
        if tl.max(tl.max(tl.max(tl.max(size, 3), 2), 1), 0) > THRESHOLD * 0.999:
            # sign(x) * max(|x| - |x|**(p-1) / beta, 0), the power in fp64 as in PyTorch.
            power = tl.exp2(tl.log2(size.to(tl.float64)) * (P - 1)).to(tl.float32)
            shrunk = tl.maximum(size - power * (1 / BETA), 0.0)
            shrunk = tl.div_rn(tl.where(residual < 0, -shrunk, shrunk), per_group(magnitude))
            fixed = _round_half_even(shrunk * per_group(inverse_scale) * 2.0**BITS)
            total += group_sum(fixed.to(tl.int64))
    return total
