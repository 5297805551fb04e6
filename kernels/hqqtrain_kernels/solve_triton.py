"""Device functions that the solvers share: a tile of groups in registers, from weights to codes.

They compute what `hqqtrain.quant` computes in PyTorch, in the same order of rounded operations, and
with sums of integers where it has sums of integers. The codes are therefore the same.

A tile is the block [R, G, T, E] of weights or codes that a program has in registers: G groups of up
to R * T * E codes. Element [r, n, t, e] is code k = E * (t * R + r) + e of group n, where t is the
thread among the T threads that share a group, and each thread has R runs of E adjacent codes. With
this shape, Triton's layouts give each thread a whole group (T = 1) or its part of a group, and sums
stay in registers. With a block [G, group_size], eight threads would share a group, and each would
repeat the operations that are done once per group. A value per group is a block [G].

(A packed tile, in contrast, is 16 bytes of packed codes: see `pack_triton`.)

"Normalized" means divided by the group's `magnitude`, the power of two at or below its largest
absolute value, as in `hqqtrain.quant.grid.QuantGrid`. A normalized scale fits normalized weights.

Kernels that use these functions must be compiled with enable_fp_fusion=False: the roundings of
separate multiplications and additions are part of the result.
"""

import triton
import triton.language as tl

MAGIC = tl.constexpr(12582912.0)
"""1.5 * 2**23. Adding a small number to it rounds the number to an integer, half to even: the
integer is in the low bits of the sum.
"""
MAGIC_BITS = tl.constexpr(0x4B400000)
"""The bits of MAGIC as fp32."""


@triton.jit
def code_index(r, R: tl.constexpr, T: tl.constexpr, E: tl.constexpr):
    """Return the number k of the codes in their group, for indices r of a tile: [r, 1, T, E]."""
    t = tl.arange(0, T)[None, None, :, None]
    return (t * R + r) * E + tl.arange(0, E)[None, None, None, :]


@triton.jit
def load_weights(
    W_ptr,
    origin,
    exists,
    stride,
    k,
    EVICTION: tl.constexpr,
    TILE: tl.constexpr,
):
    """Load the weights of a tile as fp32.

    Args:
        W_ptr: W.
        origin: Offset of the first weight of each group in W, [G] int64.
        exists: Whether the group exists, [G].
        stride: Elements between the weights of a group, for axis 0. Axis 1 ignores it.
        k: Numbers of the codes to load, from `code_index`.
        EVICTION: Eviction policy of the load.
        TILE: `tile_triton.TileConfig`. Its axis is the one that the groups run along: 1 along a
            row, 0 down a column.

    Returns:
        A tile, 0 outside of the groups.
    """
    if TILE.axis == 1:
        # The hint is false along G: weights of neighboring groups are not contiguous. It only
        # makes Triton distribute the tile over threads along E (16 bytes a thread) and then along
        # G, so that all of R stays in the registers of one thread.
        offset = tl.max_contiguous(per_group(origin) + k, (1, 2, 1, 8))
    else:
        # Distribute along G first. The second hint claims less than is true on purpose: a thread
        # should load one column of a row. Several columns would be several groups.
        offset = tl.max_contiguous(per_group(origin) + k.to(tl.int64) * stride, (1, 2, 1, 1))
        offset = tl.multiple_of(offset, (1, 1, 1, 1))
    mask = per_group(exists) & (k < TILE.group_size)
    return tl.load(W_ptr + offset, mask, 0.0, eviction_policy=EVICTION).to(tl.float32)


@triton.jit
def group_sum(x):
    """Sum a tile over each group: [R, G, T, E] -> [G]."""
    return tl.sum(tl.sum(tl.sum(x, 3), 0), 1)


@triton.jit
def group_max(x):
    """Return the maximum of each group, [R, G, T, E] -> [G], or NaN if it has one."""
    return tl.reduce(tl.reduce(tl.reduce(x, 3, _nan_max), 0, _nan_max), 1, _nan_max)


@triton.jit
def group_min(x):
    """Return the minimum of each group, [R, G, T, E] -> [G], or NaN if it has one."""
    return tl.reduce(tl.reduce(tl.reduce(x, 3, _nan_min), 0, _nan_min), 1, _nan_min)


@triton.jit
def _nan_max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _nan_min(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def per_group(x):
    """Make values of groups broadcast over a tile: [G] -> [1, G, 1, 1]."""
    return x[None, :, None, None]


@triton.jit
def clamp(x, low, high):
    """Return x clamped to [low, high]."""
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def power_of_two(x):
    """Return the power of two at or below every x >= 0, clamped to [2**-126, 2**126]."""
    bits = x.to(tl.int32, bitcast=True) & 0x7F800000  # the exponent alone
    return clamp(bits.to(tl.float32, bitcast=True), 2.0**-126, 2.0**126)


@triton.jit
def reciprocal(power):
    """Return 1 / power for results of `power_of_two`: exact, without the branches of a division."""
    return ((254 << 23) - power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """Round fp32 to the nearest number of `dtype`, and return it as fp32.

    bf16 is rounded by hand, because Triton's interpreter truncates.
    """
    if dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = bits.to(tl.float32, bitcast=True)
    elif dtype == tl.float16:
        x = x.to(tl.float16).to(tl.float32)
    return x


@triton.jit
def as_stored(
    scale,
    zero,
    magnitude,
    META_DTYPE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Return scale and zero [G] as they will be read back, like `QuantGrid.as_stored`.

    The argument `scale` is normalized. The result is not: it is the scale of the weight itself.
    """
    META_MIN: tl.constexpr = TILE.meta_min
    META_MAX: tl.constexpr = TILE.meta_max
    scale = scale * magnitude
    if tl.float16 == META_DTYPE:  # the other dtypes represent any zero
        # Move the factor by which the zero exceeds fp16 to the scale.
        excess = tl.maximum(tl.abs(zero) * (1 / META_MAX), 1.0)
        scale, zero = scale * excess, tl.div_rn(zero, excess)
    scale, zero = clamp(scale, META_MIN, META_MAX), clamp(zero, -META_MAX, META_MAX)
    return round_to(scale, META_DTYPE), round_to(zero, META_DTYPE)


@triton.jit
def encode(W, inverse_scale, zero, NBITS: tl.constexpr):
    """Return the nearest codes of a tile, like `QuantGrid.encode`; W and the scale are normalized.

    The codes have the offset that `nearest_codes` adds.
    """
    return nearest_codes(
        code_fractions(W, inverse_scale, NBITS), zero=zero, NBITS=NBITS, CLIPS=True
    )


@triton.jit
def code_fractions(W, inverse_scale, NBITS: tl.constexpr):
    """Return W / scale / 2**NBITS. Dividing by the power of two does not round."""
    return W * per_group(inverse_scale * 2.0**-NBITS)


@triton.jit
def nearest_codes(fractions, zero, NBITS: tl.constexpr, CLIPS: tl.constexpr):
    """Return the nearest codes, int32, plus MAGIC_BITS - (NBITS << 23).

    The low 22 bits of that offset are zero, so the low 8 bits of the result are the code.

    A code is clamp(round(W / scale + zero), 0, 2**NBITS - 1). All numbers are divided by 2**NBITS
    here, so that the lower and the upper bound become 0 and 1: the GPU clamps the result of an
    addition to [0, 1] for free (FADD.SAT). Adding 1.5 * 2**(23 - NBITS) then rounds to a multiple
    of 2**-NBITS, a code. The bound 1 is one code too high, 2**NBITS, which needs another minimum.
    It is reached only if a group CLIPS.
    """
    place = clamp(fractions + per_group(zero * 2.0**-NBITS), 0.0, 1.0)
    codes = (place + 1.5 * 2.0 ** (23 - NBITS)).to(tl.int32, bitcast=True)
    if CLIPS:
        codes = tl.minimum(codes, (1 << NBITS) - 1 + MAGIC_BITS - (NBITS << 23))
    return codes


@triton.jit
def mask_padding(x, mask):
    """Return x, with 0 where a padded group has no codes. `mask` is None if no group is padded."""
    if mask is not None:
        x = tl.where(mask, x, 0)
    return x


@triton.jit
def to_fixed_point(W, mask, low, high, GROUP_SIZE: tl.constexpr, BITS: tl.constexpr):
    """Round a tile to fixed point, W = low + x * step, like `FixedPoint.from_float`.

    Adding MAGIC * step rounds to a multiple of the step. The bits of the sum are those of
    MAGIC * step plus the integer x, so x needs no division by the step.

    Returns:
        x: A tile of int32, each integer plus `magic_bits`; 0 outside of the groups.
        magic_bits: [G], the bits of MAGIC * step.
        total: [G], the sum of x without `magic_bits`.
        mean: [G], the mean of the weights, normalized.
        step: [G], a power of two.
    """
    step = power_of_two(tl.maximum(high - low, 2.0**-30)) * (2.0**-BITS)
    magic = step * MAGIC
    magic_bits = magic.to(tl.int32, bitcast=True)
    x = (W - per_group(low)) + per_group(magic)
    x = mask_padding(x.to(tl.int32, bitcast=True), mask)
    if GROUP_SIZE * 2 ** (BITS + 1) < 1 << 31:
        total = group_sum(x) - magic_bits * GROUP_SIZE  # modulo 2**32: the result fits
    else:
        total = group_sum(x.to(tl.int64)) - magic_bits.to(tl.int64) * GROUP_SIZE
    mean = low + (total.to(tl.float32) * (1 / GROUP_SIZE)) * step
    return x, magic_bits, total, mean, step
