"""Quantize a weight to its packed form, and dequantize it.

The work is done in chunks to bound memory. A slice of a weight gets the same bits as within the
whole weight, so sharded ranks and a single process produce the same model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import hqqtrain_kernels as kernels
from hqqtrain.common.errors import UserError
from hqqtrain.quant import triton_backend
from hqqtrain.quant.grid import QuantGrid, power_of_two
from hqqtrain.quant.solvers.integer_zero import with_integer_zero
from hqqtrain.quant.solvers.registry import SOLVERS
from hqqtrain.quant.spec import QuantSpec
from hqqtrain_kernels import Layout

CHUNK_WEIGHTS = {"cpu": 1 << 18}
"""Weights that are solved at a time, by device type. On a CPU, this many fit into its cache."""

DEFAULT_CHUNK_WEIGHTS = 1 << 23
"""Weights that are solved at a time on other devices: 32 MiB of fp32."""


@dataclass
class QuantizedWeight:
    """A packed weight: W ~ (W_q - zero) * scale. `Layout` defines units and groups.

    Attributes:
        W_q: Packed codes, uint8 [units, unit_bytes].
        scale: [units, groups] in the spec's meta_dtype.
        zero: [units, groups] in the spec's meta_dtype.
    """

    W_q: Tensor
    scale: Tensor
    zero: Tensor


@torch.no_grad()
def quantize_weight(
    W: Tensor, spec: QuantSpec, *, name: str = "weight", rows: Sequence[slice] | None = None
) -> QuantizedWeight:
    """Quantize W on its own device.

    The units of a weight are independent. If W consists of the rows of some units only
    (`Layout.rows_of`), these units get the same bits as within the whole weight. The codes are
    the nearest ones for scale and zero as stored.

    Args:
        W: Weight [out_features, in_features] of any float dtype.
        spec: Settings of the quantization.
        name: Name of the tensor, for error messages.
        rows: The rows of tensor `name` that W consists of, for error messages; None: all rows.

    Raises:
        UserError: W contains NaN or infinity, or group_size does not divide.
    """
    quantized, not_finite = quantize_async(W, spec, name=name)
    if not_finite:
        raise not_finite_error(W, name, rows)
    return quantized


@torch.no_grad()
def quantize_async(
    W: Tensor, spec: QuantSpec, *, name: str = "weight"
) -> tuple[QuantizedWeight, Tensor]:
    """Quantize W like `quantize_weight`, without synchronizing with a GPU.

    Returns:
        The quantized weight, and a bool tensor [1] that is true if W contains NaN or infinity. In
        that case the quantized weight is meaningless; `not_finite_error` builds the error to raise.

    Raises:
        UserError: group_size does not divide.
    """
    layout = spec.layout(W.shape[0], W.shape[1], name)
    quantize = (
        triton_backend.quantize_with_triton
        if triton_backend.is_supported(W.device, layout, spec)
        else _quantize_in_chunks
    )
    W_q, scale, zero, not_finite = quantize(W, layout, spec)
    return QuantizedWeight(W_q, scale, zero), not_finite


def dequantize_weight(q: QuantizedWeight, layout: Layout, dtype: torch.dtype) -> Tensor:
    """Return the weight [out_features, in_features] that `q` encodes, rounded once to `dtype`."""
    return kernels.dequantize(q.W_q, q.scale, q.zero, layout, dtype)


def _quantize_in_chunks(
    W: Tensor, layout: Layout, spec: QuantSpec
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantize W with torch.

    Returns:
        W_q, scale and zero as in `QuantizedWeight`, and a bool tensor [1]: whether W contains NaN
        or infinity.
    """
    g, n = layout.group_size, layout.units * layout.groups
    # Arrange the groups as columns, as solvers expect them. On axis 0 the g rows of a unit are
    # `units` apart, so reshaping already puts each group into one column.
    columns = W.reshape(n, g).t() if layout.axis == 1 else W.reshape(g, n)
    codes = torch.empty(n, g, dtype=torch.uint8, device=W.device)
    meta = torch.empty(2, n, dtype=spec.meta_dtype, device=W.device)
    not_finite = torch.zeros(1, dtype=torch.bool, device=W.device)
    groups_per_chunk = max(1, CHUNK_WEIGHTS.get(W.device.type, DEFAULT_CHUNK_WEIGHTS) // g)
    for start in range(0, n, groups_per_chunk):
        groups = slice(start, min(start + groups_per_chunk, n))
        chunk = columns[:, groups].to(torch.float32).contiguous()
        not_finite |= ~chunk.isfinite().all()
        codes[groups], meta[0, groups], meta[1, groups] = _solve(chunk, spec)
    W_q = kernels.pack(codes.view(layout.units, layout.unit_codes), layout.nbits)
    scale, zero = meta.view(2, layout.units, layout.groups)
    return W_q, scale.clone(), zero.clone(), not_finite  # without the memory of the other one


def _solve(W: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Return uint8 codes [n, g], and stored scale [n] and zero [n], of the groups W [g, n] fp32.

    A constant group gets code 0, unless its zero must be an integer.
    """
    # Normalize every group: divide it by a power of two, which is exact.
    largest = W.abs().amax(0)
    magnitude = torch.where(largest == 0, 1, power_of_two(largest))
    grid = QuantGrid(spec.nbits, magnitude, spec.meta_dtype)
    is_constant = W.amin(0) == W.amax(0)
    W = W / magnitude
    # The codes must be the nearest ones for the stored scale and zero, so round these first.
    scale, zero = SOLVERS[spec.solver].solve(W, grid)
    if spec.zero == "integer":
        scale, zero = with_integer_zero(W, grid, scale, zero)
        is_constant = torch.zeros_like(is_constant)  # the zero of such a group is no integer
    else:
        scale, zero = grid.with_constants(W, *grid.as_stored(scale, zero))
    codes = grid.encode(W, *grid.as_stored(scale, zero)).masked_fill_(is_constant, 0)
    return codes.t().to(torch.uint8), *grid.to_meta_dtype(scale, zero)


def not_finite_error(W: Tensor, name: str, rows: Sequence[slice] | None) -> UserError:
    """Return the error that names the first row of W with a value that is not finite in fp32.

    Args:
        W: Rows [n, ...] of tensor `name`.
        name: Name of the whole tensor.
        rows: The rows of the tensor that W consists of; None: all rows.
    """
    W = W.reshape(len(W), -1)
    is_bad = torch.cat([~chunk.float().isfinite().all(1) for chunk in W.split(1024)])
    if rows:
        row_numbers = [i for part in rows for i in range(part.start, part.stop)]
    else:
        row_numbers = list(range(len(W)))
    first_bad = int(is_bad.nonzero()[0])
    row = W[first_bad].float()
    value = row[~row.isfinite()][0].item()
    row_number, num_bad = row_numbers[first_bad], int(is_bad.sum())
    return UserError(
        f"{name}: row {row_number} holds {value}; {num_bad} of {len(W)} rows are not "
        "finite. The checkpoint is damaged, or overflowed during conversion: use another one."
    )
