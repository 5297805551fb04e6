"""From a weight to its packed form and back: chunked, and the same bits for any slice of it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import hqqtrain_kernels as kernels
from hqqtrain.common.errors import UserError
from hqqtrain.quant import triton_backend
from hqqtrain.quant.grid import QuantGrid, power_of_two
from hqqtrain.quant.solvers.registry import SOLVERS
from hqqtrain.quant.spec import QuantSpec
from hqqtrain_kernels import Layout

CHUNK = {"cpu": 1 << 18}
"""Weights solved at a time: on a CPU what its cache holds, elsewhere 32 MiB of fp32."""

DEFAULT_CHUNK = 1 << 23


@dataclass
class QuantizedWeight:
    """W ~ (W_q - zero) * scale. W_q: packed codes, uint8 [units, row_bytes]; scale and zero
    [units, groups] in the spec's meta_dtype. See `Layout`."""

    W_q: Tensor
    scale: Tensor
    zero: Tensor


@torch.no_grad()
def quantize_weight(
    W: Tensor, spec: QuantSpec, *, name: str = "weight", rows: Sequence[slice] | None = None
) -> QuantizedWeight:
    """Quantizes W [out_features, in_features], of any float dtype, on the device it is on.

    Units of a weight are independent: given the rows of some units (`Layout.rows_of`) in place of
    the whole, these get the bits they get within the whole. `rows` then says which rows of the
    tensor `name` they are, for the message. Codes are nearest with scale and zero as stored.

    Raises UserError for NaN or infinity, naming the tensor and the row.
    """
    quantized, not_finite = quantize_async(W, spec, name=name)
    if not_finite:
        raise not_finite_error(W, name, rows)
    return quantized


@torch.no_grad()
def quantize_async(
    W: Tensor, spec: QuantSpec, *, name: str = "weight"
) -> tuple[QuantizedWeight, Tensor]:
    """`quantize_weight`, not waited for on a GPU, and a tensor [1] that is true if W is not finite.

    Then what stands in the result means nothing, and `not_finite_error` tells of W.
    """
    layout = spec.layout(W.shape[0], W.shape[1], name)
    solve = (
        triton_backend.quantize_with_triton
        if triton_backend.is_supported(W.device, layout)
        else _in_chunks
    )
    *quantized, not_finite = solve(W, layout, spec)
    return QuantizedWeight(*quantized), not_finite


def dequantize_weight(q: QuantizedWeight, layout: Layout, dtype: torch.dtype) -> Tensor:
    """The weight [out_features, in_features] that `q` stands for, rounded once to `dtype`."""
    return kernels.dequantize(q.W_q, q.scale, q.zero, layout, dtype)


def _in_chunks(W: Tensor, layout: Layout, spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W_q, scale, zero; and [1], true where W is not finite."""
    g, n = layout.group_size, layout.units * layout.groups
    columns = W.reshape(n, g).t() if layout.axis == 1 else W.reshape(g, n)
    codes = torch.empty(n, g, dtype=torch.uint8, device=W.device)
    meta = torch.empty(2, n, dtype=spec.meta_dtype, device=W.device)
    not_finite = torch.zeros(1, dtype=torch.bool, device=W.device)
    for part in _chunks(n, g, W.device):
        chunk = columns[:, part].to(torch.float32).contiguous()
        not_finite |= ~chunk.isfinite().all()
        codes[part], meta[0, part], meta[1, part] = _solve(chunk, spec)
    W_q = kernels.pack(codes.view(layout.units, layout.row_codes), layout.nbits)
    scale, zero = meta.view(2, layout.units, layout.groups)
    return W_q, scale.clone(), zero.clone(), not_finite


def _chunks(n: int, g: int, device: torch.device) -> Iterator[slice]:
    step = max(1, CHUNK.get(device.type, DEFAULT_CHUNK) // g)
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def _solve(W: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 codes [n, g], scale [n] and zero [n] of the columns of W [g, n] fp32.

    A constant group c is stored as (0 - zero) * scale with scale a power of two: exactly, where
    the dtype of zero holds c.
    """
    largest = W.abs().amax(0)
    unit = torch.where(largest == 0, 1, power_of_two(largest))
    grid = QuantGrid(spec.nbits, unit, spec.meta_dtype)
    constant = W.amin(0) == W.amax(0)
    W = W / unit
    scale, zero = grid.stored(*SOLVERS[spec.solver](W, grid))
    whole, _ = grid.stored(torch.ones_like(scale), zero)
    scale = torch.where(constant, whole, scale)
    zero = torch.where(constant, -W[0] / whole, zero)
    codes = grid.encode(W, *grid.stored(scale, zero)).masked_fill_(constant, 0)
    return codes.t().to(torch.uint8), *grid.store(scale, zero)


def not_finite_error(W: Tensor, name: str, rows: Sequence[slice] | None) -> UserError:
    """For W, some rows [n, ...] of `name`: the first one with a value that fp32 does not hold."""
    W = W.reshape(len(W), -1)
    bad = torch.cat([~part.float().isfinite().all(1) for part in W.split(1024)])
    numbers = [i for part in rows for i in range(part.start, part.stop)] if rows else range(len(W))
    first = int(bad.nonzero()[0])
    row = W[first].float()
    value = row[~row.isfinite()][0].item()
    return UserError(
        f"{name}: row {numbers[first]} holds {value}; {int(bad.sum())} of {len(W)} rows are not "
        "finite. The checkpoint is damaged, or overflowed when it was converted: use another."
    )
