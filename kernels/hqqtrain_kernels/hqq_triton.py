"""hqq's solver on a tile of groups: `hqqtrain.quant.solvers.hqq.hqq` explains it."""

import triton
import triton.language as tl

from hqqtrain_kernels.solve_triton import (
    MAGIC_BITS,
    code_index,
    encode,
    in_fixed_point,
    load,
    nearest,
    over_codes,
    reciprocal,
    shares,
    spread_out,
    within,
)


@triton.jit
def hqq(
    W, inside, low, high, unit, tile, LAST: tl.constexpr, g: tl.constexpr, R: tl.constexpr,
    T: tl.constexpr, E: tl.constexpr, AXIS: tl.constexpr, NUMBERS: tl.constexpr,
    NBITS: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """Scale (in units) and zero [G] of a tile W in units; `tile` says where to read it again.

    And which groups are not done, unless this is the LAST launch: those with residuals so large
    that they shrink, which takes 40 registers more.
    """
    ROUNDS: tl.constexpr = NUMBERS[0]
    BETA: tl.constexpr = NUMBERS[1]
    P: tl.constexpr = NUMBERS[2]
    NUDGES: tl.constexpr = NUMBERS[3]
    BITS: tl.constexpr = NUMBERS[4]
    SHRUNK_BITS: tl.constexpr = NUMBERS[5]
    width = tl.maximum(high - low, 2.0**-30)
    inverse = tl.div_rn(1.0, width) * TOP  # as torch divides a number by a tensor
    capped = tl.minimum(inverse, unit * 2e4)
    inverse = tl.where(width * unit <= 1e-4, inverse, capped)
    first = -low * inverse
    scale = tl.div_rn(1.0, inverse)
    _, _, _, mean, _ = in_fixed_point(W, inside, low, high, g, BITS)
    mean = mean * inverse
    peak = high * inverse
    inverse_again = tl.div_rn(1.0, scale)
    THRESHOLD: tl.constexpr = BETA ** (-1 / (2 - P))
    rest = tl.zeros(first.shape, tl.int1)
    best = first
    least = tl.full(first.shape, float("inf"), tl.float64)
    OFFSET: tl.constexpr = MAGIC_BITS - (NBITS << 23)
    ALL_OFFSETS: tl.constexpr = (g * OFFSET + 0x80000000) % 0x100000000 - 0x80000000
    share = shares(W, inverse, NBITS)
    TRIES: tl.constexpr = len(NUDGES) if NBITS == 1 else 1
    for i in tl.static_range(TRIES):
        zero = first
        if NBITS == 4:
            zero = _whole(first)
        left = ROUNDS
        _, clips = _status(zero, zero, NUDGES[i], peak, TOP)
        while left > 0:
            previous = zero
            shrinks = tl.maximum(tl.abs(zero - first), 0.5) * 1.01 * (scale * unit) > THRESHOLD
            rest = rest | shrinks
            if clips:
                n = _sum_codes(share, zero + NUDGES[i], inside, NBITS, True)
            else:
                n = _sum_codes(share, zero + NUDGES[i], inside, NBITS, False)
            zero = (n - ALL_OFFSETS).to(tl.float32) * (1 / g) - mean
            if LAST and tl.max(shrinks.to(tl.int32), 0) > 0:
                shrunk = _sum_shrunk(
                    tile, previous, NUDGES[i], inverse, unit, g, R, T, E, AXIS, NBITS, BETA, P,
                    SHRUNK_BITS, THRESHOLD,
                )  # fmt: skip
                zero = zero + shrunk.to(tl.float32) * (2.0**-SHRUNK_BITS / g)
            if NBITS == 1:
                error = (encode(W, inverse_again, zero, NBITS) - OFFSET).to(tl.float32)
                error = (error - spread_out(zero)) * spread_out(scale) - W
                error = over_codes(within((error * error).to(tl.float64), inside))
                best = tl.where(error < least * (1 - 1e-12), zero, best)
                least = tl.minimum(error, least)
            moved, clips = _status(zero, previous, NUDGES[i], peak, TOP)
            left = tl.where(moved, left - 1, 0)
        if NBITS > 1:
            best = zero
    return scale, best, rest


@triton.jit
def _sum_codes(share, zero, inside, NBITS: tl.constexpr, CLIPS: tl.constexpr):
    """Of every group. Once with CLIPS and once without, as whole branches, and with a barrier in
    one: without it the compiler computes both sums in every round, and chooses then (on sm_90 303
    instead of 190 instructions for 64 weights)."""
    if CLIPS:
        tl.debug_barrier()
    return over_codes(within(nearest(share, zero, NBITS, CLIPS), inside))


@triton.jit
def _status(zero, previous, nudge, peak, TOP: tl.constexpr):
    """Of any group of the tile: has its zero moved, will a code be clipped?

    One reduction over the warp answers both questions. The second exactly, because the peak's
    share has the same roundings. A margin would be met often: zeros of 4 bits begin as whole
    numbers, up to half a code from where the peak fits, and then hardly move.
    """
    moved = (zero != previous).to(tl.int32)
    clips = (peak + (zero + nudge) >= TOP + 0.5).to(tl.int32)
    counts = tl.sum(moved + (clips << 16), 0)  # of at most 512 groups each
    return (counts & 0xFFFF) > 0, (counts >> 16) > 0


@triton.jit
def _whole(x):
    """Rounded half to even, whatever its size."""
    size = tl.abs(x)
    size = tl.where(size < 8388608.0, (size + 8388608.0) - 8388608.0, size)
    return tl.where(x < 0, -size, size)


@triton.jit
def _sum_shrunk(
    tile, zero, nudge, inverse, unit, g: tl.constexpr, R: tl.constexpr, T: tl.constexpr,
    E: tl.constexpr, AXIS: tl.constexpr, NBITS: tl.constexpr, BETA: tl.constexpr,
    P: tl.constexpr, BITS: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    """What hqq's shrinkage leaves of a group's residuals, summed in fixed point [G].

    The tile is read again in R parts: at once, the powers would take more registers than there are.
    """
    total = tl.zeros(zero.shape, tl.int64)
    for r in range(R):
        k = code_index(r, R, T, E)
        W = load(tile, k, g, AXIS, "evict_first") * spread_out(reciprocal(unit))
        codes = encode(W, inverse, zero + nudge, NBITS) - (MAGIC_BITS - (NBITS << 23))
        away = tl.div_rn(codes.to(tl.float32) - spread_out(zero), spread_out(inverse))
        residual = W - away
        size = tl.where(k < g, tl.abs(residual) * spread_out(unit), 0.0)
        if tl.max(tl.max(tl.max(tl.max(size, 3), 2), 1), 0) > THRESHOLD * 0.999:
            power = tl.exp2(tl.log2(size.to(tl.float64)) * (P - 1)).to(tl.float32)
            shrunk = tl.maximum(size - power * (1 / BETA), 0.0)
            shrunk = tl.div_rn(tl.where(residual < 0, -shrunk, shrunk), spread_out(unit))
            total += over_codes(_whole(shrunk * spread_out(inverse) * 2.0**BITS).to(tl.int64))
    return total
