"""The fused quantizer: a weight is read once; codes, scale and zero are written once.

Everything between happens in registers, so that quantizing costs what its arithmetic costs:
hqq's library moves 88 bytes a weight and round through memory.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqqtrain_kernels.hqq_triton import hqq
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
    empty = W.new_empty
    scale = empty(layout.units, layout.groups, dtype=meta_dtype)
    zero = torch.empty_like(scale)
    bad = torch.zeros(1, dtype=torch.int32, device=W.device)
    packs = _packs(layout)
    columns = layout.row_bytes if packs else layout.row_codes
    codes = empty(layout.units, columns, dtype=torch.uint8)
    with torch.cuda.device_of(W):
        _launch(W, codes, scale, zero, bad, layout, method, packs)
    return (codes if packs else pack(codes, layout.nbits)), scale, zero, bad


def _packs(layout: Layout) -> bool:
    """Whether the kernel packs: groups of 8, 16, 32 ... Other codes are packed by torch."""
    g = layout.group_size
    return g >= 8 and g & (g - 1) == 0


def _launch(
    W: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, bad: Tensor,
    layout: Layout, method: Method, packs: bool,
) -> None:  # fmt: skip
    g, units, groups = layout.group_size, layout.units, layout.groups
    if packs and layout.nbits != 3 and W.is_contiguous() and _is_seamless(layout):
        units, groups = 1, units * groups
    tiling = _tiling(layout, method.name)
    blocks = triton.cdiv(groups, tiling["G"])
    apart = layout.units * W.stride(0)
    limits = torch.finfo(scale.dtype)
    _quantize[(units * blocks,)](
        W, codes.view(torch.int16) if packs else codes, scale, zero, bad,
        groups, blocks, W.stride(0), apart, apart, codes.stride(0) // (2 if packs else 1),
        packed_bytes(groups * g, planes(layout.nbits)[0]) // 16,
        AXIS=layout.axis, NBITS=layout.nbits, g=g, PACKS=packs, SOLVER=method.name,
        NUMBERS=method.numbers, LEAST=max(limits.smallest_normal * limits.eps, 2.0**-126),
        LARGEST=limits.max, num_stages=1, enable_fp_fusion=False, **tiling,
    )  # fmt: skip


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


@triton.jit
def _quantize(
    W_ptr, codes_ptr, scale_ptr, zero_ptr, bad_ptr, groups, blocks, row_stride, group_stride,
    group_stride_again, codes_stride, low_tiles, AXIS: tl.constexpr, NBITS: tl.constexpr,
    g: tl.constexpr, R: tl.constexpr, G: tl.constexpr, T: tl.constexpr, E: tl.constexpr,
    PACKS: tl.constexpr, SOLVER: tl.constexpr, NUMBERS: tl.constexpr, LEAST: tl.constexpr,
    LARGEST: tl.constexpr,
):  # fmt: skip
    TOP: tl.constexpr = 2**NBITS - 1
    unit_index = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks) * G
    n = first + tl.arange(0, G)
    tile = (W_ptr + unit_index * row_stride, n, groups, group_stride)
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
        # nor would its addresses, which is why their stride comes under two names.
        tile = (W_ptr + unit_index * row_stride, n, groups, group_stride_again)
        W = load(tile, k, g, AXIS, "evict_first") * spread_out(shrink)
    inverse = tl.where(constant, 0.0, tl.div_rn(1.0, tl.div_rn(scale, unit)))
    codes = encode(W, inverse, tl.where(constant, 0.0, zero), TOP)

    meta = unit_index * groups + n
    tl.store(scale_ptr + meta, scale.to(dtype), n < groups)
    tl.store(zero_ptr + meta, zero.to(dtype), n < groups)
    codes_ptr += unit_index * codes_stride
    if PACKS:
        codes = tl.reshape(tl.permute(codes, 1, 2, 0, 3), G * T * R * E // 8, 8)
        chunks = groups * (g // 8)
        if NBITS == 3:
            _store_plane(codes & 3, codes_ptr, first * (g // 8), chunks, 2)
            _store_plane(codes >> 2, codes_ptr + low_tiles * 8, first * (g // 8), chunks, 1)
        else:
            _store_plane(codes, codes_ptr, first * (g // 8), chunks, NBITS)
    else:
        at = n.to(tl.int64)[None, :, None, None] * g + k
        tl.store(codes_ptr + at, codes.to(tl.uint8), (n < groups)[None, :, None, None] & (k < g))


@triton.jit
def _store_plane(codes, ptr, first_chunk, chunks, WIDTH: tl.constexpr):
    """Packs [chunks, 8] codes of WIDTH bits into tiles of 8 halfwords: see `reference`."""
    FIELDS: tl.constexpr = 16 // WIDTH
    TILES: tl.constexpr = codes.shape[0] // FIELDS
    fields = tl.reshape(codes, TILES, FIELDS, 8)
    shift = tl.arange(0, FIELDS)[None, :, None] * WIDTH
    halfwords = tl.sum(fields << shift, 1).to(tl.int16)
    tile = first_chunk // FIELDS + tl.arange(0, TILES).to(tl.int64)
    at = tile[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(ptr + at, halfwords, (tile < (chunks + FIELDS - 1) // FIELDS)[:, None])
