"""Column by column: less error of the outputs, GPTQ's own recursion, and bits of slices."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from hqqtrain.quant.calibrated.fit import weighted_least_squares
from hqqtrain.quant.calibrated.quantize import quantize_rows
from hqqtrain.quant.calibrated.statistics import (
    FEEDBACK_DAMPING,
    ColumnPlan,
    InputStatistics,
    plan_columns,
)
from hqqtrain.quant.grid import QuantGrid, power_of_two
from hqqtrain.quant.quantize import QuantizedWeight, dequantize_weight, quantize_weight
from hqqtrain.quant.spec import QuantSpec

ROWS, COLUMNS, TOKENS = 120, 96, 2000


def inputs(columns: int = COLUMNS) -> Tensor:
    """Return correlated inputs [tokens, columns], some channels of which are enormous."""
    size = torch.logspace(-2, 1, columns)[torch.randperm(columns)]
    return torch.randn(TOKENS, columns) @ torch.randn(columns, columns) / columns**0.5 * size


def spec_of(nbits: int, group_size: int | None, axis: int, **options: str) -> QuantSpec:
    return QuantSpec(nbits, group_size, axis, "gptq", torch.bfloat16, **options)


def output_error(W: Tensor, q: QuantizedWeight, spec: QuantSpec, gram: Tensor) -> float:
    difference = (dequantize_weight(q, spec.layout(*W.shape), torch.float32) - W).double()
    return float(((difference @ gram.double()) * difference).sum())


def quantize(W: Tensor, spec: QuantSpec, plan: ColumnPlan) -> QuantizedWeight:
    return quantize_rows(W, spec.layout(*W.shape), 0, spec, plan)


@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("group_size", [8, 24, None])
@pytest.mark.parametrize("nbits", [4, 3, 2, 1])
def test_weights_and_feedback_lower_the_error_of_the_outputs(
    axis: int, group_size: int | None, nbits: int
) -> None:
    W, x = torch.randn(ROWS, COLUMNS), inputs()
    gram, spec = x.t() @ x / TOKENS, spec_of(nbits, group_size, axis)
    statistics, g = InputStatistics(gram), spec.layout(*W.shape).group_size
    weighted, feedback = (
        output_error(W, quantize(W, spec, plan), spec, gram)
        for plan in (plan_columns(statistics, g, axis, has_feedback=f) for f in (False, True))
    )
    alone = output_error(W, quantize_weight(W, spec), spec, gram)
    # On axis 0 all weights of a group have the same input, so weights change nothing there.
    assert weighted < (0.95 if axis else 1.2) * alone
    assert feedback < 0.85 * weighted


def test_the_recursion_is_that_of_gptq() -> None:
    """Compare with the update of all remaining weights after each column, in fp64."""
    x = inputs()
    x = x[:, x.square().mean(0).argsort(descending=True)]  # so columns keep their order
    gram, g, W = x.t() @ x / TOKENS, 16, torch.randn(ROWS, COLUMNS)
    spec = spec_of(3, g, 1)
    plan = plan_columns(InputStatistics(gram), g, 1, has_feedback=True)
    assert plan.columns.tolist() == list(range(COLUMNS))
    found = dequantize_weight(quantize(W, spec, plan), spec.layout(*W.shape), torch.float64)

    moments = gram.double() + torch.eye(COLUMNS) * FEEDBACK_DAMPING * gram.diagonal().mean()
    inverse, rest, expected = torch.linalg.inv(moments), W.double(), torch.empty_like(found)
    for column in range(COLUMNS):
        if column % g == 0:
            group = rest[:, column : column + g].t().float()
            grid = QuantGrid(3, power_of_two(group.abs().amax(0)), torch.bfloat16)
            weights = plan.importance[column : column + g, None]
            scale, zero = weighted_least_squares(group / grid.magnitude, weights, grid)
            scale = (scale * grid.magnitude).double()
        code = (rest[:, column] / scale + zero).round().clamp(0, 7)
        expected[:, column] = (code - zero) * scale
        error = (rest[:, column] - expected[:, column]) / inverse[column, column]
        rest = rest - error[:, None] * inverse[column]
        inverse = inverse - inverse[:, column, None] * inverse[column] / inverse[column, column]
    # A weight halfway between two codes may fall to either side, and changes those behind it.
    assert ((found - expected).abs() < 1e-5).double().mean() > 0.97
    errors = [float((((v - W) @ moments) * (v - W)).sum()) for v in (found, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


@pytest.mark.parametrize(("axis", "group_size"), [(1, 8), (1, None), (1, 48), (0, 8), (0, 40)])
@pytest.mark.parametrize("has_feedback", [True, False])
def test_slices_and_threads_do_not_change_bits(
    axis: int, group_size: int | None, has_feedback: bool
) -> None:
    W, x = torch.randn(ROWS, COLUMNS), inputs()
    spec = spec_of(2, group_size, axis)
    layout = spec.layout(*W.shape)
    cross = (x + 0.1 * torch.randn_like(x)).t() @ x / TOKENS
    statistics = InputStatistics(x.t() @ x / TOKENS, cross)
    plan = plan_columns(statistics, layout.group_size, axis, has_feedback=has_feedback)
    whole = quantize(W, spec, plan)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(quantize(W, spec, plan).W_q, whole.W_q)
    finally:
        torch.set_num_threads(threads)
    cuts = [0, 1, layout.units // 3, layout.units]
    parts = [
        quantize_rows(torch.cat([W[rows] for rows in layout.rows_of(a, b)]), layout, a, spec, plan)
        for a, b in pairwise(cuts)
    ]
    for name in ("W_q", "scale", "zero"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name))


@pytest.mark.parametrize("block", [32, 64])
def test_blocks_of_rows_are_independent(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    W, x, spec = torch.randn(ROWS, COLUMNS), inputs(), spec_of(2, 24, 1)
    plan = plan_columns(InputStatistics(x.t() @ x / TOKENS), 24, 1, has_feedback=True)
    whole = dequantize_weight(quantize(W, spec, plan), spec.layout(*W.shape), torch.float32)
    monkeypatch.setitem(quantize_rows.__wrapped__.__globals__["BLOCK_ROWS"], "cpu", block)
    parts = dequantize_weight(quantize(W, spec, plan), spec.layout(*W.shape), torch.float32)
    assert (parts - whole).abs().mean() < 1e-3 * whole.abs().mean()


@pytest.mark.parametrize("axis", [1, 0])
def test_integer_zeros(axis: int) -> None:
    W, x, spec = torch.randn(ROWS, COLUMNS), inputs(), spec_of(4, 8, axis, zero="integer")
    plan = plan_columns(InputStatistics(x.t() @ x / TOKENS), 8, axis, has_feedback=True)
    q = quantize(W, spec, plan)
    assert torch.equal(q.zero, q.zero.round().clamp(0, 15))


@pytest.mark.parametrize("W", [
    torch.zeros(ROWS, COLUMNS), torch.full((ROWS, COLUMNS), 3.0), torch.eye(ROWS, COLUMNS) * 1e30,
    torch.eye(ROWS, COLUMNS) * 1e-30,
], ids=["zero", "constant", "huge", "tiny"])  # fmt: skip
def test_extreme_weights_stay_finite(W: Tensor) -> None:
    x, spec = inputs(), spec_of(2, 8, 1)
    plan = plan_columns(InputStatistics(x.t() @ x / TOKENS), 8, 1, has_feedback=True)
    back = dequantize_weight(quantize(W, spec, plan), spec.layout(*W.shape), torch.float32)
    assert back.isfinite().all()
    assert (back - W).abs().max() <= W.abs().max() * 1.05


@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_constant_weights_are_exact_and_nearly_constant_ones_close(
    axis: int, dtype: torch.dtype
) -> None:
    x, spec = inputs(), QuantSpec(4, 8, axis, "gptq", dtype)
    plan = plan_columns(InputStatistics(x.t() @ x / TOKENS), 8, axis, has_feedback=True)
    for value, noise, tolerance in ((0, 0, 0), (-3, 0, 0), (3, 1e-5, 0.05)):
        W = value + noise * torch.randn(ROWS, COLUMNS)
        back = dequantize_weight(quantize(W, spec, plan), spec.layout(*W.shape), torch.float32)
        assert (back - W).abs().max() <= tolerance
