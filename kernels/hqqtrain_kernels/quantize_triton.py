"""The fused quantizer: a weight goes in; codes, scale and zero come out.

Everything between happens in registers, so that quantizing costs what its arithmetic costs:
hqq's library moves 88 bytes a weight and round through memory.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqqtrain_kernels.launch_triton import MOST_REGISTERS, Variant
from hqqtrain_kernels.layout import Layout, packed_bytes, planes
from hqqtrain_kernels.reference import pack
from hqqtrain_kernels.tile_triton import REST, quantize_tile


@dataclass(frozen=True)
class Method:
    """A solver by name and its numbers, as `hqqtrain.quant` has them: passed to the kernel."""

    name: str
    numbers: tuple


def quantize(
    W: Tensor, layout: Layout, method: Method, meta_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W_q uint8 [units, row_bytes], scale and zero [units, groups], and int32 [1]: 0, or 1 if W
    holds NaN or infinity, and then the rest means nothing.

    W [out_features, in_features] is of any float dtype, on a GPU. Not waited for: to do so, and to
    launch again, takes 0.1 ms of a weight's 0.2 to 0.6 (28672 x 8192, H100).
    """
    if W.stride(1) != 1:
        W = W.contiguous()
    stride = W.stride(0)
    step = 8 if stride % 8 == 0 else 1
    plan = _plan(layout, method, meta_dtype, stride == layout.in_features, step)
    codes = W.new_empty(layout.units, plan.columns, dtype=torch.uint8)
    scale = W.new_empty(layout.units, layout.groups, dtype=meta_dtype)
    zero = torch.empty_like(scale)
    not_finite = W.new_zeros(1, dtype=torch.int32)
    tensors = (W, codes, scale, zero, not_finite)
    numbers = (plan.groups, stride // step, layout.units, layout.units)
    for launch in plan.launches:
        grid = (plan.units * launch.blocks, 1, 1)
        launch.variant.launch(grid, tensors, (launch.blocks, *numbers))
    W_q = codes if _packs(layout) else pack(codes, layout.nbits)
    return W_q, scale, zero, not_finite


@dataclass(frozen=True)
class _Launch:
    """A kernel, which does a unit in so many programs."""

    variant: Variant
    blocks: int


@dataclass(frozen=True)
class _Plan:
    """Kernels that run one after the other, over units of so many groups, and the bytes of a unit
    that they write."""

    launches: tuple[_Launch, ...]
    units: int
    groups: int
    columns: int


@functools.cache
def _plan(
    layout: Layout, method: Method, meta_dtype: torch.dtype, contiguous: bool, step: int
) -> _Plan:
    units, groups, packs = layout.units, layout.groups, _packs(layout)
    if packs and contiguous and layout.nbits != 3 and _is_seamless(layout):
        units, groups = 1, units * groups
    limits = torch.finfo(meta_dtype)
    constants = {
        "STEP": step, "AXIS": layout.axis, "NBITS": layout.nbits, "g": layout.group_size,
        "CELL": _cell(layout) if packs else 1,
        "TILES": packed_bytes(layout.row_codes, planes(layout.nbits)[0]) // 16,
        "ROW": layout.row_bytes // 2 if packs else layout.row_codes, "PACKS": packs,
        "SOLVER": method.name, "NUMBERS": method.numbers, "LARGEST": limits.max,
        "LEAST": max(limits.smallest_normal * limits.eps, 2.0**-126),
    }  # fmt: skip
    kernels = (_quantize, _quantize_rest) if method.name == "hqq" else (_quantize,)
    launches = tuple(_launch(kernel, constants, layout, groups) for kernel in kernels)
    return _Plan(launches, units, groups, layout.row_bytes if packs else layout.row_codes)


def _launch(kernel: Any, constants: dict[str, Any], layout: Layout, groups: int) -> _Launch:
    rest, solver = kernel is _quantize_rest, constants["SOLVER"]
    tiling = _tiling(layout, solver, rest)
    options = {"num_warps": tiling.pop("num_warps"), "num_stages": 1, "enable_fp_fusion": False}
    if options["num_warps"] <= 8 and (solver == "hqq" or not constants["PACKS"]):
        options["maxnreg"] = MOST_REGISTERS  # of which least squares would take 254 (2 bits)
    variant = Variant(kernel, constants | tiling, **options)
    return _Launch(variant, triton.cdiv(groups, tiling["G"] * (SEARCHED.value if rest else 1)))


def _packs(layout: Layout) -> bool:
    """Whether the kernel packs: groups of 8, 16, 32 ... Other codes are packed by torch."""
    g = layout.group_size
    return g >= 8 and g & (g - 1) == 0


def _cell(layout: Layout) -> int:
    """Groups that fill a tile of 128 bits in every plane."""
    return max(1, 128 // (layout.group_size * min(planes(layout.nbits))))


def _tiling(layout: Layout, solver: str, rest: bool) -> dict[str, int]:
    """The shape of a tile, see `solve_triton`, and warps; one warp but for the longest groups.

    64 codes in a thread keep what is done once for a group cheap: 32 took 1.1 to 1.5 times as long
    (H200, groups of 64, an earlier form of the kernels; of hqq since: ADR 7). But what is known of
    a group takes registers too, so small groups, of which a thread has several, get fewer, as do
    padded ones, and hqq's second launch, and hqq at 1 bit, which keeps the best of its rounds.
    """
    g = layout.group_size
    padded = max(8, triton.next_power_of_2(g))
    codes = {"rtn": 64, "hqq": padded}.get(solver, max(16, 2 * padded))
    narrow = padded != g or rest or (solver == "hqq" and layout.nbits == 1)
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


SEARCHED = tl.constexpr(32)
"""The second launch has one program for so many times its G groups: the first leaves few, of most
weights none."""


@triton.jit(do_not_specialize=["blocks", "groups", "row_stride", "units", "units_again"])
def _quantize(
    W_ptr, codes_ptr, scale_ptr, zero_ptr, bad_ptr, blocks, groups, row_stride, units, units_again,
    STEP: tl.constexpr, AXIS: tl.constexpr, NBITS: tl.constexpr, g: tl.constexpr,
    CELL: tl.constexpr, TILES: tl.constexpr, ROW: tl.constexpr, PACKS: tl.constexpr,
    SOLVER: tl.constexpr, NUMBERS: tl.constexpr, LARGEST: tl.constexpr, LEAST: tl.constexpr,
    R: tl.constexpr, G: tl.constexpr, T: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """G neighbouring groups."""
    unit_index = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks) * G
    quantize_tile(
        W_ptr, codes_ptr, scale_ptr, zero_ptr, bad_ptr, unit_index, first + tl.arange(0, G),
        first // CELL, groups, row_stride.to(tl.int64) * STEP, units, units_again, False,
        AXIS, NBITS, g, CELL, TILES, ROW, PACKS, SOLVER, NUMBERS, LARGEST, LEAST, R, G, T, E,
    )  # fmt: skip


@triton.jit(do_not_specialize=["blocks", "groups", "row_stride", "units", "units_again"])
def _quantize_rest(
    W_ptr, codes_ptr, scale_ptr, zero_ptr, bad_ptr, blocks, groups, row_stride, units, units_again,
    STEP: tl.constexpr, AXIS: tl.constexpr, NBITS: tl.constexpr, g: tl.constexpr,
    CELL: tl.constexpr, TILES: tl.constexpr, ROW: tl.constexpr, PACKS: tl.constexpr,
    SOLVER: tl.constexpr, NUMBERS: tl.constexpr, LARGEST: tl.constexpr, LEAST: tl.constexpr,
    R: tl.constexpr, G: tl.constexpr, T: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """What `_quantize` has left of SEARCHED * G groups, G of them at a time.

    In cells: so many groups fill whole tiles of packed codes and are written without others.
    """
    unit_index = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks) * (SEARCHED * G // CELL)
    scales = scale_ptr + unit_index * groups
    place = tl.zeros((G // CELL,), tl.int32)
    left = _is_rest(scales, first * CELL, groups, SEARCHED * G)
    if left > 0:
        place, left = _find_rest(scales, first, groups, G, CELL)
    while left > 0:
        # Zero, which the compiler does not see: it would keep all addresses from round to round.
        nothing = left * (left + 1) & 1
        n = tl.reshape(place[:, None] * CELL + tl.arange(0, CELL)[None, :], (G,))
        quantize_tile(
            W_ptr, codes_ptr, scale_ptr, zero_ptr, bad_ptr, unit_index, n, place, groups,
            row_stride.to(tl.int64) * STEP, units + nothing, units_again + nothing, True,
            AXIS, NBITS, g, CELL, TILES, ROW, PACKS, SOLVER, NUMBERS, LARGEST, LEAST, R, G, T, E,
        )  # fmt: skip
        tl.debug_barrier()  # the scales that were written are read again
        place, left = _find_rest(scales, first, groups, G, CELL)


@triton.jit
def _is_rest(scales, first, groups, COUNT: tl.constexpr):
    """1 if any of COUNT groups is to be done, else 0: one look at all of them."""
    n = first + tl.arange(0, COUNT)
    scale = tl.load(scales + n, n < groups, 0.0)
    return tl.max((scale.to(tl.float32) == REST).to(tl.int32), 0)


@triton.jit
def _find_rest(scales, first, groups, G: tl.constexpr, CELL: tl.constexpr):
    """The first G / CELL of the cells with a group to be done, and how many there are.

    In the place of those that are missing the number of all cells, which do not exist.
    """
    slot = tl.arange(0, G // CELL)
    place = tl.zeros((G // CELL,), tl.int32) + tl.cdiv(groups, CELL)
    count = 0
    for i in range(SEARCHED):
        cell = first + i * (G // CELL) + slot
        at = cell[:, None] * CELL + tl.arange(0, CELL)[None, :]
        scale = tl.load(scales + at, at < groups, 0.0)
        rest = tl.max((scale.to(tl.float32) == REST).to(tl.int32), 1)
        number = count + tl.cumsum(rest, 0) - rest
        found = (rest > 0)[:, None] & (number[:, None] == slot[None, :])
        place = tl.minimum(place, tl.min(tl.where(found, cell[:, None], groups), 0))
        count += tl.sum(rest, 0)
    return place, count
