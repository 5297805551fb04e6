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
from hqqtrain_kernels.launch_triton import MOST_REGISTERS, Variant
from hqqtrain_kernels.layout import Layout, packed_bytes, planes
from hqqtrain_kernels.least_squares_triton import least_squares
from hqqtrain_kernels.pack_triton import store_packed
from hqqtrain_kernels.reference import pack
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


@dataclass(frozen=True)
class Method:
    """A solver by name and its numbers, as `hqqtrain.quant` has them: passed to the kernel."""

    name: str
    numbers: tuple


def quantize(
    W: Tensor, layout: Layout, method: Method, meta_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor] | None:
    """W_q uint8 [units, row_bytes], scale and zero [units, groups]; None for NaN or infinity in W.

    W [out_features, in_features] is of any float dtype, on a GPU.
    """
    if W.stride(1) != 1:
        W = W.contiguous()
    stride = W.stride(0)
    step = 8 if stride % 8 == 0 else 1
    plan = _plan(layout, method, meta_dtype, stride == layout.in_features, step)
    codes = W.new_empty(layout.units, plan.columns, dtype=torch.uint8)
    scale = W.new_empty(layout.units, layout.groups, dtype=meta_dtype)
    zero = torch.empty_like(scale)
    status = torch.zeros(2, dtype=torch.int32, pin_memory=W.is_cuda)
    numbers = (plan.groups, stride // step, layout.units, layout.units)
    tensors = (W, codes, scale, zero, status)
    plan.variant.launch((plan.programs, 1, 1), (*tensors, None), (plan.blocks, *numbers))
    if W.is_cuda:  # its memory is the host's: nothing has to be copied
        torch.cuda.current_stream(W.device).synchronize()
    not_finite, left = status.tolist()
    if not_finite:
        return None
    if left:
        cells = _left(scale.view(-1, plan.groups), plan.cell)
        programs = -(-len(cells) * plan.cell // plan.tile)
        plan.variant.launch((programs, 1, 1), (*tensors, cells), (len(cells), *numbers))
    return (codes if _packs(layout) else pack(codes, layout.nbits)), scale, zero


LEFT = -1.0
"""In the place of a scale: the group is left to the second launch."""


def _left(scale: Tensor, cell: int) -> Tensor:
    """Cells with such a group, of scale [units, groups]: numbered through all units, int32."""
    ragged = -scale.shape[1] % cell
    left = torch.nn.functional.pad(scale == LEFT, (0, ragged)).view(-1, cell).any(1)
    return left.nonzero().view(-1).to(torch.int32)


@dataclass(frozen=True)
class _Plan:
    """A kernel, how many programs of it, and what they are told.

    `groups` of a unit are done in `blocks` programs, of `tile` groups each. `cell`: so many groups
    fill whole tiles of packed codes, and can be written without their neighbours. `columns`: the
    bytes of a unit that the kernel writes.
    """

    variant: Variant
    programs: int
    groups: int
    blocks: int
    tile: int
    cell: int
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
    cell = _cell(layout) if packs else 1
    constants = {
        "STEP": step, "AXIS": layout.axis, "NBITS": layout.nbits, "g": layout.group_size,
        "CELL": cell, "TILES": packed_bytes(layout.row_codes, planes(layout.nbits)[0]) // 16,
        "ROW": layout.row_bytes // 2 if packs else layout.row_codes, "PACKS": packs,
        "LEFT": LEFT, "SOLVER": method.name, "NUMBERS": method.numbers, "LARGEST": limits.max,
        "LEAST": max(limits.smallest_normal * limits.eps, 2.0**-126), **tiling,
    }  # fmt: skip
    registers = {}
    if warps <= 8 and (method.name == "hqq" or not packs):
        registers = {"maxnreg": MOST_REGISTERS}
    variant = Variant(
        _quantize, constants, num_warps=warps, num_stages=1, enable_fp_fusion=False, **registers
    )  # fmt: skip
    columns = layout.row_bytes if packs else layout.row_codes
    return _Plan(variant, units * blocks, groups, blocks, tiling["G"], cell, columns)


def _packs(layout: Layout) -> bool:
    """Whether the kernel packs: groups of 8, 16, 32 ... Other codes are packed by torch."""
    g = layout.group_size
    return g >= 8 and g & (g - 1) == 0


def _cell(layout: Layout) -> int:
    """Groups that fill a tile of 128 bits in every plane."""
    return max(1, 128 // (layout.group_size * min(planes(layout.nbits))))


def _tiling(layout: Layout, solver: str) -> dict[str, int]:
    """The shape of a tile, see `solve_triton`, and warps; one warp but for the longest groups.

    64 codes in a thread keep what is done once for a group cheap: 32 take 1.1 to 1.5 times as
    long (H200, groups of 64). But what is known of a group takes registers too, so small groups,
    of which a thread has several, get fewer, as do padded ones, and hqq at 1 bit, which keeps the
    best of its rounds.
    """
    g = layout.group_size
    padded = max(8, triton.next_power_of_2(g))
    codes = {"rtn": 64, "hqq": padded}.get(solver, max(16, 2 * padded))
    narrow = padded != g or (solver == "hqq" and layout.nbits == 1)
    codes = min(codes, 32 if narrow else 64)
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


@triton.jit(do_not_specialize=["blocks", "groups", "row_stride", "units", "units_again"])
def _quantize(
    W_ptr, codes_ptr, scale_ptr, zero_ptr, status_ptr, cells_ptr, blocks, groups, row_stride,
    units, units_again,
    STEP: tl.constexpr, AXIS: tl.constexpr, NBITS: tl.constexpr, g: tl.constexpr,
    CELL: tl.constexpr, TILES: tl.constexpr, ROW: tl.constexpr, PACKS: tl.constexpr,
    LEFT: tl.constexpr, SOLVER: tl.constexpr, NUMBERS: tl.constexpr, LARGEST: tl.constexpr,
    LEAST: tl.constexpr, R: tl.constexpr, G: tl.constexpr, T: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """G neighbouring groups, or those of the cells that `cells_ptr` lists, `blocks` of them."""
    TOP: tl.constexpr = 2**NBITS - 1
    unit_index, n, place = _whereabouts(cells_ptr, blocks, groups, G, CELL)
    row_stride = row_stride.to(tl.int64) * STEP
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
        tl.store(status_ptr, 1)
    unit = tl.where(size == 0, 1.0, power_of_two(size))
    shrink = reciprocal(unit)
    W, high, low = W * spread_out(shrink), high * shrink, low * shrink
    dtype: tl.constexpr = scale_ptr.dtype.element_ty
    left = None
    if SOLVER == "rtn":
        scale = tl.maximum(high - low, 2.0**-30) * (1 / TOP)
        zero = tl.div_rn(-low, scale)
    elif SOLVER == "hqq":
        SHRINKS: tl.constexpr = cells_ptr is not None
        scale, zero, left = hqq(
            W, inside, low, high, unit, tile, SHRINKS, g, R, T, E, AXIS, NUMBERS, NBITS, TOP
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
    codes = encode(W, inverse, tl.where(constant, 0.0, zero), NBITS, True)

    if cells_ptr is None and left is not None:
        left = left & (n < groups)
        scale = tl.where(left, LEFT, scale)
        if tl.max(left.to(tl.int32), 0) > 0:
            tl.store(status_ptr + 1, 1)
    meta = unit_index * groups + n
    tl.store(scale_ptr + meta, scale.to(dtype), n < groups)
    tl.store(zero_ptr + meta, zero.to(dtype), n < groups)
    if PACKS:
        codes = tl.reshape(tl.permute(codes, 1, 2, 0, 3), G * T * R * E // 8, 8)
        row = codes_ptr.to(tl.pointer_type(tl.int16)) + place[0] * ROW
        store_packed(codes, row, place[1], groups * (g // 8), CELL * g, NBITS, TILES)
    else:
        at = spread_out(unit_index * ROW + n.to(tl.int64) * g) + k
        tl.store(codes_ptr + at, codes.to(tl.uint8), spread_out(n < groups) & (k < g))


@triton.jit
def _whereabouts(cells_ptr, blocks, groups, G: tl.constexpr, CELL: tl.constexpr):
    """Unit and number in it of G groups, and unit and number of their cells.

    Neighbours have one unit and number their cells by the first; the listed have [G], [G / CELL].
    """
    if cells_ptr is None:
        unit = (tl.program_id(0) // blocks).to(tl.int64)
        first = (tl.program_id(0) % blocks) * G
        n = first + tl.arange(0, G)
        place = (unit, first // CELL)
    else:
        in_unit = tl.cdiv(groups, CELL)
        i = tl.program_id(0) * (G // CELL) + tl.arange(0, G // CELL)
        cell = tl.load(cells_ptr + i, i < blocks, 0)
        units = (cell // in_unit).to(tl.int64)
        numbers = tl.where(i < blocks, cell % in_unit, in_unit)
        place = (units, numbers)
        unit = tl.reshape(tl.broadcast_to(units[:, None], (G // CELL, CELL)), (G,))
        n = tl.reshape(numbers[:, None] * CELL + tl.arange(0, CELL)[None, :], (G,))
    return unit, n, place
