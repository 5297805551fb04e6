"""Quantize the rows of a weight column by column, and pass the error of each column on.

The work is cut into blocks of a fixed number of units. A slice of a weight gets the same bits as
within the whole weight, because each of its rows has its place in a block of the same shape; the
rows that a rank does not have are zeros there. On a CPU each block runs on one thread.
"""

import torch
from torch import Tensor

import hqqtrain_kernels as kernels
from hqqtrain.quant.calibrated.columns import quantize_columns
from hqqtrain.quant.calibrated.fit import weighted_least_squares
from hqqtrain.quant.calibrated.parallel import map_in_order
from hqqtrain.quant.calibrated.statistics import ColumnPlan
from hqqtrain.quant.grid import QuantGrid, power_of_two
from hqqtrain.quant.quantize import QuantizedWeight
from hqqtrain.quant.spec import QuantSpec
from hqqtrain_kernels import Layout

BLOCK_ROWS = {"cpu": 512}
"""Most rows of a block, by device type."""

DEFAULT_BLOCK_ROWS = 16384
"""Most rows of a block on other devices, where every column costs some kernel launches."""

MAX_FIT_WEIGHTS = 1 << 22
"""Most weights of a block whose groups are fitted at the same time, to bound memory."""

BLOCK_COLUMNS = 64
"""Columns whose errors are passed on to the columns behind them in one product of matrices."""


@torch.no_grad()
def quantize_rows(
    W: Tensor, layout: Layout, first_unit: int, spec: QuantSpec, plan: ColumnPlan
) -> QuantizedWeight:
    """Quantize the rows of some units of a weight, on their own device.

    Args:
        W: The rows of these units (`Layout.rows_of`), of any float dtype and without NaN or Inf.
        layout: The layout of the whole weight.
        first_unit: The first unit that W contains.
        spec: Settings of the quantization.
        plan: The order of the columns, and what their errors cost.
    """
    unit_rows = layout.out_features // layout.units
    units = len(W) // unit_rows
    size = _block_units(layout, W.device)
    codes = torch.empty(units, layout.in_features, unit_rows, dtype=torch.uint8, device=W.device)
    meta = torch.empty(2, units, layout.groups, dtype=spec.meta_dtype, device=W.device)
    W = W.reshape(unit_rows, units, layout.in_features)

    def quantize(number: int) -> None:
        """Quantize the units that W has of block `number`."""
        first = number * size - first_unit  # of the block, counted from the first unit of W
        mine = slice(max(0, first), min(units, first + size))
        place = slice(mine.start - first, mine.stop - first)
        block = torch.zeros(layout.in_features, unit_rows, size, device=W.device)
        block[:, :, place] = W[:, mine].permute(2, 0, 1)
        block_codes, block_meta = _quantize_block(block, layout, spec, plan)
        codes[mine] = block_codes[:, :, place].permute(2, 0, 1)
        meta[:, mine] = block_meta[:, :, place].transpose(1, 2)

    map_in_order(quantize, range(first_unit // size, -(-(first_unit + units) // size)), W.device)
    W_q = kernels.pack(codes.view(units, layout.unit_codes), layout.nbits)
    return QuantizedWeight(W_q, meta[0].clone(), meta[1].clone())


def _block_units(layout: Layout, device: torch.device) -> int:
    """Return the units of a block: it depends on the whole weight, not on the rows of a rank."""
    unit_rows = layout.out_features // layout.units
    rows = BLOCK_ROWS.get(device.type, DEFAULT_BLOCK_ROWS)
    rows = min(rows, MAX_FIT_WEIGHTS // _fitted_columns(layout))
    return min(max(1, rows // unit_rows), layout.units)


def _fitted_columns(layout: Layout) -> int:
    """Return the number of columns whose groups are fitted at the same time.

    On axis 1 a group is a part of a row. On axis 0 it is a part of a column, so the groups of
    several columns are fitted before the first of these columns passes its errors on.
    """
    return layout.group_size if layout.axis == 1 else min(BLOCK_COLUMNS, layout.in_features)


def _block_columns(layout: Layout) -> int:
    """Return the number of columns of a block: whole groups, or a part that divides a group."""
    fitted = _fitted_columns(layout)
    if fitted <= BLOCK_COLUMNS:
        return BLOCK_COLUMNS // fitted * fitted
    return next(size for size in range(BLOCK_COLUMNS, 0, -1) if fitted % size == 0)


def _quantize_block(
    W: Tensor, layout: Layout, spec: QuantSpec, plan: ColumnPlan
) -> tuple[Tensor, Tensor]:
    """Quantize a block.

    Args:
        W: fp32 [columns, rows of a unit, units]; it is overwritten.
        layout: The layout of the whole weight.
        spec: Settings of the quantization.
        plan: The order of the columns, and what their errors cost.

    Returns:
        uint8 codes [columns, rows of a unit, units], and stored scale and zero [2, groups, units].
    """
    if plan.correction is not None:
        W += (plan.correction.t() @ W.flatten(1)).view_as(W)
    W = W[plan.columns]
    codes = torch.empty_like(W, dtype=torch.uint8)
    meta = W.new_empty(2, layout.groups, W.shape[2], dtype=spec.meta_dtype)
    group_columns = layout.group_size if layout.axis == 1 else 1
    fitted, block_columns = _fitted_columns(layout), _block_columns(layout)
    step = min(fitted, block_columns)
    for start in range(0, len(W), block_columns):
        stop = min(start + block_columns, len(W))
        errors = torch.empty_like(W[start:stop])
        for first in range(start, stop, step):
            last = min(first + step, stop)
            if first % fitted == 0:
                columns = slice(first, first + fitted)
                fit = _fit_groups(W[columns], layout, spec, plan.importance[columns])
                meta[:, first // group_columns :][:, : fit.shape[1]] = fit
            groups = slice(first // group_columns, (last - 1) // group_columns + 1)
            quantize_columns(
                W[first:stop],
                meta[0, groups],
                meta[1, groups],
                None if plan.feedback is None else plan.feedback[first:last, first:stop],
                codes[first:last],
                errors[first - start : last - start],
                nbits=spec.nbits,
                group_columns=group_columns,
            )
        if plan.feedback is not None:  # the columns behind this block
            W[stop:].flatten(1).addmm_(plan.feedback[start:stop, stop:].t(), errors.flatten(1))
    group_order = plan.columns[::group_columns] // group_columns
    return (
        torch.empty_like(codes).index_copy_(0, plan.columns, codes),
        torch.empty_like(meta).index_copy_(1, group_order, meta),
    )


def _fit_groups(W: Tensor, layout: Layout, spec: QuantSpec, importance: Tensor) -> Tensor:
    """Return stored scale and zero [2, groups, units] of some columns.

    Args:
        W: fp32 [columns, rows of a unit, units], the columns of one group on axis 1.
        layout: The layout of the whole weight.
        spec: Settings of the quantization.
        importance: fp32 [columns], the weight of a squared error of each column.
    """
    if layout.axis == 1:
        groups, weights = W[:, 0], importance[:, None]
    else:  # all errors of a column weigh the same
        groups = W.transpose(0, 1).flatten(1)
        weights = torch.ones_like(groups[:, :1])
    largest = groups.abs().amax(0)
    grid = QuantGrid(
        spec.nbits, torch.where(largest == 0, 1, power_of_two(largest)), spec.meta_dtype
    )
    groups, is_integer = groups / grid.magnitude, spec.zero == "integer"
    scale, zero = weighted_least_squares(groups, weights, grid, integer_zero=is_integer)
    if not is_integer:
        scale, zero = grid.with_constants(groups, scale, zero)
    return torch.stack(grid.to_meta_dtype(scale, zero)).view(2, -1, W.shape[2])
