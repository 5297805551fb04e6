"""The solvers as device functions: a tile of groups in registers, from weights to codes.

They compute what `hqqtrain.quant` computes in torch, in the same order of rounded operations, and
sums of integers where it has sums: so the codes are the same. A tile is [R, G, T, E]: code
k = E (t R + r) + e of each of G groups. Triton's layouts then give a thread the whole of a group
(T = 1), or T threads each a part, and sums stay
in registers. As a tile [G, group_size] eight threads would share a group, and each repeat what is
done once for it.

Kernels that use them must be compiled with enable_fp_fusion=False.
"""

import triton
import triton.language as tl

MAGIC = tl.constexpr(12582912.0)
"""1.5 * 2**23: added to a small number it leaves it rounded, half to even, in its low bits."""
MAGIC_BITS = tl.constexpr(0x4B400000)
TWICE_MAGIC_BITS = tl.constexpr(0x96800000 - (1 << 32))
"""As int32, which wraps; the square of MAGIC_BITS is a multiple of 2**32."""


@triton.jit
def code_index(r, R: tl.constexpr, T: tl.constexpr, E: tl.constexpr):
    """[r, 1, T, E]: which code of its group a place in the tile is."""
    t = tl.arange(0, T)[None, None, :, None]
    return (t * R + r) * E + tl.arange(0, E)[None, None, None, :]


@triton.jit
def load(tile, k, g: tl.constexpr, AXIS: tl.constexpr, EVICTION: tl.constexpr):
    """Codes k of the groups of a tile, fp32: along a row (axis 1) or down a column; 0 outside.

    tile: W, where in it the groups begin [G], which there are [G], and how far apart the codes of
    a group are (axis 0).
    """
    W, origin, exists, stride = tile
    if AXIS == 1:
        # Not true of the groups, and used for nothing but the order in which dimensions are dealt
        # out to threads: first within 16 bytes, then over groups, so that R is left to registers.
        at = tl.max_contiguous(spread_out(origin) + k, (1, 2, 1, 8))
    else:
        # Over groups first. And understated: a thread is to load one column of a row, not several,
        # which are other groups.
        at = tl.max_contiguous(spread_out(origin) + k.to(tl.int64) * stride, (1, 2, 1, 1))
        at = tl.multiple_of(at, (1, 1, 1, 1))
    mask = spread_out(exists) & (k < g)
    return tl.load(W + at, mask, 0.0, eviction_policy=EVICTION).to(tl.float32)


@triton.jit
def over_codes(x):
    """[R, G, T, E] -> [G]: the sum over each group."""
    return tl.sum(tl.sum(tl.sum(x, 3), 0), 1)


@triton.jit
def largest(x):
    """[R, G, T, E] -> [G]; NaN where there is one."""
    return tl.reduce(tl.reduce(tl.reduce(x, 3, _larger), 0, _larger), 1, _larger)


@triton.jit
def least(x):
    return tl.reduce(tl.reduce(tl.reduce(x, 3, _lesser), 0, _lesser), 1, _lesser)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _lesser(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def spread_out(x):
    """[G] -> [1, G, 1, 1]."""
    return x[None, :, None, None]


@triton.jit
def clamped(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def power_of_two(x):
    bits = x.to(tl.int32, bitcast=True) & 0x7F800000
    return clamped(bits.to(tl.float32, bitcast=True), 2.0**-126, 2.0**126)


@triton.jit
def reciprocal(power):
    """1 / power of a `power_of_two`: exact, and without the branches of a division."""
    return ((254 << 23) - power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def rounded_to(x, dtype: tl.constexpr):
    """fp32 that `dtype` holds exactly. Triton's interpreter truncates to bf16, so by hand."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = bits.to(tl.float32, bitcast=True)
    elif dtype == tl.float16:
        x = x.to(tl.float16).to(tl.float32)
    return x


@triton.jit
def stored(scale, zero, unit, LEAST: tl.constexpr, LARGEST: tl.constexpr, dtype: tl.constexpr):
    """Scale (of the weight itself) and zero as they will be read back: `Grid.store`."""
    scale = scale * unit
    if dtype == tl.float16:  # the others hold any zero
        excess = tl.maximum(tl.abs(zero) * (1 / LARGEST), 1.0)
        scale, zero = scale * excess, tl.div_rn(zero, excess)
    scale, zero = clamped(scale, LEAST, LARGEST), clamped(zero, -LARGEST, LARGEST)
    return rounded_to(scale, dtype), rounded_to(zero, dtype)


@triton.jit
def encode(W, inverse, zero, NBITS: tl.constexpr):
    """The nearest codes, int32, as `nearest` leaves them; W in units, inverse of the scale in
    units: `Grid.encode`."""
    return nearest(shares(W, inverse, NBITS), zero, NBITS, True)


@triton.jit
def shares(W, inverse, NBITS: tl.constexpr):
    """W over the scale, divided by 2**NBITS, which is exact."""
    return W * spread_out(inverse * 2.0**-NBITS)


@triton.jit
def nearest(share, zero, NBITS: tl.constexpr, CLIPS: tl.constexpr):
    """The codes nearest to `shares`, plus MAGIC_BITS - (NBITS << 23), whose low 22 bits are zero.

    The addition clamps to 0 and 1 for nothing (FADD.SAT). That leaves the code after the last,
    which is met only if a group CLIPS.
    """
    place = clamped(share + spread_out(zero * 2.0**-NBITS), 0.0, 1.0)
    codes = (place + 1.5 * 2.0 ** (23 - NBITS)).to(tl.int32, bitcast=True)
    if CLIPS:
        codes = tl.minimum(codes, (1 << NBITS) - 1 + MAGIC_BITS - (NBITS << 23))
    return codes


@triton.jit
def within(x, inside):
    """x, and 0 where a padded group has no codes; `inside` is None where none is padded."""
    if inside is not None:
        x = tl.where(inside, x, 0)
    return x


@triton.jit
def in_fixed_point(W, inside, low, high, g: tl.constexpr, BITS: tl.constexpr):
    """`FixedPoint.of`: W = low + x * step. x int32, with `bits` [G] on, 0 outside the group; the
    sum of x without them; its mean in units; step: [G].

    The magic number comes in steps, and with it the rounding: so x needs no multiplication.
    """
    step = power_of_two(tl.maximum(high - low, 2.0**-30)) * (2.0**-BITS)
    magic = step * MAGIC
    bits = magic.to(tl.int32, bitcast=True)
    x = (W - spread_out(low)) + spread_out(magic)
    x = within(x.to(tl.int32, bitcast=True), inside)
    if g * 2 ** (BITS + 1) < 1 << 31:
        total = over_codes(x) - bits * g  # modulo 2**32
    else:
        total = over_codes(x.to(tl.int64)) - bits.to(tl.int64) * g
    return x, bits, total, low + (total.to(tl.float32) * (1 / g)) * step, step
