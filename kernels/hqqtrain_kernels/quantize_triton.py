"""The fused quantizer: a weight goes in; codes, scale and zero come out.

Everything in between happens in registers, so the arithmetic alone determines the time. hqq's
library, in contrast, moves 88 bytes per weight through memory in every round.

This module plans and launches the kernels of `quantize_kernels_triton`. hqq's solver takes two
launches; all others take one.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from hqqtrain_kernels.launcher_triton import MAX_REGISTERS, CachedKernel
from hqqtrain_kernels.layout import Layout, packed_bytes, plane_widths
from hqqtrain_kernels.quantize_kernels_triton import (
    SEARCHED_TILES,
    quantize_deferred_kernel,
    quantize_kernel,
)
from hqqtrain_kernels.reference import min_stored_scale, pack
from hqqtrain_kernels.solver_params import SUPPORTED_SOLVERS, SolverParams
from hqqtrain_kernels.tile_triton import TileConfig


class QuantizedTensors(NamedTuple):
    """The result of the quantizer.

    Attributes:
        W_q: Packed codes, uint8 [units, unit_bytes].
        scale: [units, groups].
        zero: [units, groups].
        not_finite: int32 [1]: 1 if the weight holds NaN or infinity, and then the other tensors
            mean nothing; otherwise 0.
    """

    W_q: Tensor
    scale: Tensor
    zero: Tensor
    not_finite: Tensor


def quantize(
    W: Tensor, layout: Layout, solver: str, params: SolverParams, meta_dtype: torch.dtype
) -> QuantizedTensors:
    """Quantize a weight on a GPU, without waiting for the result.

    Waiting, and launching again afterwards, would cost 0.1 ms, where a weight of 28672 x 8192 takes
    0.2 to 0.6 ms (H100).

    Args:
        W: [out_features, in_features], of any float dtype.
        layout: How to cut and pack the weight.
        solver: One of SUPPORTED_SOLVERS.
        params: The solver's parameters, of the type that SUPPORTED_SOLVERS names.
        meta_dtype: Dtype of scale and zero.

    Raises:
        ValueError: The solver has no kernel, or its parameters have another type.
    """
    params_class = SUPPORTED_SOLVERS.get(solver)
    if params_class is None:
        supported = ", ".join(SUPPORTED_SOLVERS)
        raise ValueError(f"solver={solver}: it has no kernel; those with one are {supported}")
    if not isinstance(params, params_class):
        raise ValueError(f"params={params}: solver={solver} takes {params_class.__name__}")
    if W.stride(1) != 1:
        W = W.contiguous()
    stride = W.stride(0)
    stride_divisor = 8 if stride % 8 == 0 else 1
    plan = _plan(
        layout=layout,
        solver=solver,
        params=params,
        meta_dtype=meta_dtype,
        contiguous=stride == layout.in_features,
        stride_divisor=stride_divisor,
    )
    codes = W.new_empty(layout.units, plan.written_unit_bytes, dtype=torch.uint8)
    scale = W.new_empty(layout.units, layout.groups, dtype=meta_dtype)
    zero = torch.empty_like(scale)
    not_finite = W.new_zeros(1, dtype=torch.int32)
    for launch in plan.launches:
        launch.kernel.launch(
            grid=(plan.units * launch.programs_per_unit, 1, 1),
            tensors={
                "W_ptr": W,
                "codes_ptr": codes,
                "scale_ptr": scale,
                "zero_ptr": zero,
                "not_finite_ptr": not_finite,
            },
            integers={
                "programs_per_unit": launch.programs_per_unit,
                "groups": plan.groups,
                "row_stride": stride // stride_divisor,
                "units": layout.units,
                "units_again": layout.units,
            },
        )
    W_q = codes if _packs(layout) else pack(codes, layout.nbits)
    return QuantizedTensors(W_q=W_q, scale=scale, zero=zero, not_finite=not_finite)


@dataclass(frozen=True)
class _Launch:
    """A kernel, and how many of its programs quantize a unit."""

    kernel: CachedKernel
    programs_per_unit: int


@dataclass(frozen=True)
class _Plan:
    """Kernels to launch one after the other.

    Attributes:
        launches: The kernels.
        units: Units as the kernels see them. A seamless weight (`_is_seamless`) is one long unit.
        groups: Groups of a unit as the kernels see it.
        written_unit_bytes: Bytes that the kernels write for a unit of the layout: packed, or one
            byte per code for PyTorch to pack.
    """

    launches: tuple[_Launch, ...]
    units: int
    groups: int
    written_unit_bytes: int


@functools.cache
def _plan(
    layout: Layout,
    solver: str,
    params: SolverParams,
    meta_dtype: torch.dtype,
    contiguous: bool,
    stride_divisor: int,
) -> _Plan:
    units, groups, packs = layout.units, layout.groups, _packs(layout)
    if packs and contiguous and layout.nbits != 3 and _is_seamless(layout):
        units, groups = 1, units * groups
    launches = tuple(
        _launch(
            layout=layout,
            solver=solver,
            params=params,
            meta_dtype=meta_dtype,
            stride_divisor=stride_divisor,
            groups=groups,
            deferred=deferred,
        )
        for deferred in ((False, True) if solver == "hqq" else (False,))
    )
    written_unit_bytes = layout.unit_bytes if packs else layout.unit_codes
    return _Plan(
        launches=launches, units=units, groups=groups, written_unit_bytes=written_unit_bytes
    )


def _launch(
    layout: Layout,
    solver: str,
    params: SolverParams,
    meta_dtype: torch.dtype,
    stride_divisor: int,
    groups: int,
    deferred: bool,
) -> _Launch:
    """Return the first launch, or hqq's second one for the groups that the first has deferred."""
    packs, limits = _packs(layout), torch.finfo(meta_dtype)
    tiling = _tiling(layout, solver, deferred)
    tile = TileConfig(
        axis=layout.axis,
        nbits=layout.nbits,
        group_size=layout.group_size,
        cell_groups=_cell_groups(layout) if packs else 1,
        low_plane_tiles=packed_bytes(layout.unit_codes, plane_widths(layout.nbits)[0]) // 16,
        unit_length=layout.unit_bytes // 2 if packs else layout.unit_codes,
        packs=packs,
        solver=solver,
        params=params,
        meta_min=min_stored_scale(meta_dtype),
        meta_max=limits.max,
        R=tiling.R,
        G=tiling.G,
        T=tiling.T,
        E=tiling.E,
    )
    options: dict[str, Any] = {
        "num_warps": tiling.num_warps,
        "num_stages": 1,
        "enable_fp_fusion": False,
    }
    if tiling.num_warps <= 8 and (solver == "hqq" or not packs):
        options["maxnreg"] = MAX_REGISTERS  # not for least squares: it would use 254 (2 bits)
    kernel = quantize_deferred_kernel if deferred else quantize_kernel
    groups_per_program = tiling.G * (SEARCHED_TILES.value if deferred else 1)
    return _Launch(
        kernel=CachedKernel(kernel, {"STRIDE_DIVISOR": stride_divisor, "TILE": tile}, **options),
        programs_per_unit=triton.cdiv(groups, groups_per_program),
    )


def _packs(layout: Layout) -> bool:
    """Whether the kernel packs the codes, for groups of 8, 16, 32 ... PyTorch packs all others."""
    g = layout.group_size
    return g >= 8 and g & (g - 1) == 0


def _cell_groups(layout: Layout) -> int:
    """Return the number of groups of a cell, which fill whole packed tiles of every plane."""
    return max(1, 128 // (layout.group_size * min(plane_widths(layout.nbits))))


class _Tiling(NamedTuple):
    """Shape [R, G, T, E] of a tile, which `solve_triton` explains, and the warps of its program."""

    R: int
    G: int
    T: int
    E: int
    num_warps: int


def _tiling(layout: Layout, solver: str, deferred: bool) -> _Tiling:
    """Choose the shape of a tile. A program has one warp, except for very long groups.

    With 64 codes in a thread, operations that are done once per group cost little per weight. With
    32 codes, quantizing took 1.1 to 1.5 times as long (H200, groups of 64, an earlier version of
    the kernels; ADR 7 has newer figures for hqq). On the other hand, values per group take
    registers, too. A thread therefore gets at most one small group for hqq, and two for least
    squares. It gets at most 32 codes with padded groups, in hqq's second launch, and for hqq at
    1 bit, which keeps the best of its rounds.
    """
    g = layout.group_size
    padded = max(8, triton.next_power_of_2(g))
    codes_per_thread = {"rtn": 64, "hqq": padded}.get(solver, max(16, 2 * padded))
    needs_registers = padded != g or deferred or (solver == "hqq" and layout.nbits == 1)
    codes_per_thread = min(codes_per_thread, 32 if needs_registers else 64)
    threads_per_group = max(1, padded // codes_per_thread)
    groups_per_thread = max(1, codes_per_thread // padded)
    # Adjacent codes of a thread: axis 1 loads 8 adjacent weights at once; on axis 0 the weights of
    # a group are not adjacent.
    adjacent_codes = 8 if layout.axis == 1 else 1
    return _Tiling(
        R=padded // (adjacent_codes * threads_per_group),
        G=max(1, 32 // threads_per_group) * groups_per_thread,
        T=threads_per_group,
        E=adjacent_codes,
        num_warps=max(1, threads_per_group // 32),
    )


def _is_seamless(layout: Layout) -> bool:
    """Whether units follow each other without padding, both as codes and packed."""
    return layout.unit_codes * layout.nbits % 128 == 0
