"""The fused quantizer: a weight is read once; codes, scale and zero are written once.

Everything between happens in registers, so that quantizing costs what its arithmetic costs:
hqq's library moves 88 bytes a weight and round through memory.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqqtrain_kernels.hqq_triton import hqq
from hqqtrain_kernels.launch_triton import Variant
from hqqtrain_kernels.layout import Layout, packed_bytes, planes
from hqqtrain_kernels.least_squares_triton import least_squares
from hqqtrain_kernels.reference import pack
from hqqtrain_kernels.solve_triton import (
    code_index,
    encode,
    largest,
    least,
    load,
    power_of_two,
    spread_out,
    stored,
)


@dataclass(frozen=True)
class Method:
    """A solver by name and its numbers, as `hqqtrain.quant` has them: passed to the kernel."""

    name: str
    numbers: tuple


def quantize(
    W: Tensor, layout: Layout, method: Method, meta_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W_q uint8 [units, row_bytes], scale and zero [units, groups], and int32 [1]: not finite?

    W [out_features, in_features] is of any float dtype, on a GPU. The last result is 1 where W
    holds a NaN or an infinity; what the rest holds is then meaningless.
    """
    if W.stride(1) != 1:
        W = W.contiguous()
    stride = W.stride(0)
    step = 8 if stride % 8 == 0 else 1
    plan = _plan(layout, method, meta_dtype, stride == layout.in_features, step)
    codes = W.new_empty(layout.units, plan.columns, dtype=torch.uint8)
    scale = W.new_empty(layout.units, layout.groups, dtype=meta_dtype)
    zero = torch.empty_like(scale)
    bad = W.new_zeros(1, dtype=torch.int32)
    numbers = (*plan.numbers, stride // step, layout.units, layout.units)
    plan.variant.launch((plan.programs, 1, 1), (W, codes, scale, zero, bad), numbers)
    return (codes if _packs(layout) else pack(codes, layout.nbits)), scale, zero, bad


@dataclass(frozen=True)
class _Plan:
    """A kernel, how many programs of it, their numbers, and the bytes of a unit they write."""

    variant: Variant
    programs: int
    numbers: tuple[int, int]
    columns: int


@functools.cache
def _plan(
    layout: Layout, method: Method, meta_dtype: torch.dtype, contiguous: bool, step: int
) -> _Plan:
    units, groups, packs = layout.units, layout.groups, _packs(layout)
    if packs and contiguous and layout.nbits != 3 and _is_seamless(layout):
        units, groups = 1, units * groups
    tiling = _tiling(layout, method.name)
    warps, limits = tiling.pop("num_warps"), torch.finfo(meta_dtype)
    blocks = triton.cdiv(groups, tiling["G"])
    constants = {
        "STEP": step, "AXIS": layout.axis, "NBITS": layout.nbits, "g": layout.group_size,
        "TILES": packed_bytes(layout.row_codes, planes(layout.nbits)[0]) // 16,
        "ROW": layout.row_bytes // 2 if packs else layout.row_codes, "PACKS": packs,
        "SOLVER": method.name, "NUMBERS": method.numbers, "LARGEST": limits.max,
        "LEAST": max(limits.smallest_normal * limits.eps, 2.0**-126), **tiling,
    }  # fmt: skip
    variant = Variant(_quantize, constants, num_warps=warps, num_stages=1, enable_fp_fusion=False)
    columns = layout.row_bytes if packs else layout.row_codes
    return _Plan(variant, units * blocks, (groups, blocks), columns)


def _packs(layout: Layout) -> bool:
    """Whether the kernel packs: groups of 8, 16, 32 ... Other codes are packed by torch."""
    g = layout.group_size
    return g >= 8 and g & (g - 1) == 0


def _tiling(layout: Layout, solver: str) -> dict[str, int]:
    """The shape of a tile, see `solve_triton`, and warps; one warp but for the longest groups.

    64 codes in a thread keep what is done once for a group cheap: 32 take 1.1 to 1.5 times as
    long (H200, groups of 64). But what is known of a group takes registers too, so small groups,
    of which a thread has several, get fewer, and hqq at 1 bit, which keeps the best of its rounds.
    """
    padded = max(8, triton.next_power_of_2(layout.group_size))
    codes = {"rtn": 64, "hqq": padded}.get(solver, max(16, 2 * padded))
    codes = min(codes, 32 if solver == "hqq" and layout.nbits == 1 else 64)
    threads = max(1, padded // codes)
    neighbours = 8 if layout.axis == 1 else 1
    return {
        "R": padded // (neighbours * threads),
        "G": max(1, 32 // threads) * max(1, codes // padded),
        "T": threads,
        "E": neighbours,
        "num_warps": max(1, threads // 32),
    }


def _is_seamless(layout: Layout) -> bool:
    """Whether units follow each other without padding, in the codes as in the packed bytes."""
    return layout.row_codes * layout.nbits % 128 == 0


@triton.jit(do_not_specialize=["groups", "blocks", "row_stride", "units", "units_again"])
def _quantize(
    W_ptr, codes_ptr, scale_ptr, zero_ptr, bad_ptr, groups, blocks, row_stride, units, units_again,
    STEP: tl.constexpr, AXIS: tl.constexpr, NBITS: tl.constexpr, g: tl.constexpr,
    TILES: tl.constexpr, ROW: tl.constexpr, PACKS: tl.constexpr, SOLVER: tl.constexpr,
    NUMBERS: tl.constexpr, LARGEST: tl.constexpr, LEAST: tl.constexpr, R: tl.constexpr,
    G: tl.constexpr, T: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    TOP: tl.constexpr = 2**NBITS - 1
    unit_index = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks) * G
    n = first + tl.arange(0, G)
    row_stride = row_stride.to(tl.int64) * STEP
    tile = (W_ptr + unit_index * row_stride, n, groups, units * row_stride)
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
    shrink = tl.div_rn(1.0, unit)
    W, high, low = W * spread_out(shrink), high * shrink, low * shrink
    dtype: tl.constexpr = scale_ptr.dtype.element_ty
    if SOLVER == "rtn":
        scale = tl.maximum(high - low, 2.0**-30) * (1 / TOP)
        zero = tl.div_rn(-low, scale)
    elif SOLVER == "hqq":
        scale, zero = hqq(W, inside, low, high, unit, tile, g, R, T, E, AXIS, NUMBERS, NBITS, TOP)
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
    if SOLVER != "rtn":
        # Read again, from the L2 cache: kept in registers meanwhile, W would leave no room there;
        # nor would its addresses, which is why `units` comes under two names.
        tile = (W_ptr + unit_index * row_stride, n, groups, units_again * row_stride)
        W = load(tile, k, g, AXIS, "evict_first") * spread_out(shrink)
    inverse = tl.where(constant, 0.0, tl.div_rn(1.0, tl.div_rn(scale, unit)))
    codes = encode(W, inverse, tl.where(constant, 0.0, zero), TOP)

    meta = unit_index * groups + n
    tl.store(scale_ptr + meta, scale.to(dtype), n < groups)
    tl.store(zero_ptr + meta, zero.to(dtype), n < groups)
    if PACKS:
        codes = tl.reshape(tl.permute(codes, 1, 2, 0, 3), G * T * R * E // 8, 8)
        row = codes_ptr.to(tl.pointer_type(tl.int16)) + unit_index * ROW
        chunk, chunks = first * (g // 8), groups * (g // 8)
        if NBITS == 3:
            _store_plane(codes & 3, row, chunk, chunks, 2, 3)
            _store_plane(codes >> 2, row + TILES * 8, chunk, chunks, 1, 4)
        else:
            HALVINGS: tl.constexpr = 1 if NBITS == 8 else 2 if NBITS == 4 else 5 - NBITS
            _store_plane(codes, row, chunk, chunks, NBITS, HALVINGS)
    else:
        at = n.to(tl.int64)[None, :, None, None] * g + k
        tl.store(
            codes_ptr + unit_index * ROW + at,
            codes.to(tl.uint8),
            (n < groups)[None, :, None, None] & (k < g),
        )


@triton.jit
def _store_plane(codes, ptr, first_chunk, chunks, WIDTH: tl.constexpr, HALVINGS: tl.constexpr):
    """Packs chunks of codes of WIDTH bits [chunks, 8] into tiles of 8 halfwords: see `reference`.

    By halves: Triton 3.6 gets a sum wrong that runs over lanes which are not neighbours, as those
    of a tile are where threads share a group; over two of them it is right.
    """
    for i in tl.static_range(HALVINGS):
        pairs = tl.reshape(codes, codes.shape[0] // 2, 2, 8)
        codes = tl.sum(pairs << (tl.arange(0, 2)[None, :, None] * (WIDTH << i)), 1)
    tile = (first_chunk >> HALVINGS) + tl.arange(0, codes.shape[0]).to(tl.int64)
    at = tile[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = tile < (chunks + (1 << HALVINGS) - 1) >> HALVINGS
    tl.store(ptr + at, codes.to(tl.int16), inside[:, None])
