"""Columns with known scales: nearest codes, and errors that reach the columns behind."""

import pytest
import torch
from torch import Tensor

from hqqtrain.quant.calibrated.columns import quantize_columns


@pytest.mark.parametrize("has_feedback", [True, False])
@pytest.mark.parametrize(("group_columns", "unit_rows", "count"), [(4, 1, 4), (1, 3, 6), (2, 1, 3)])
def test_nearest_codes_and_errors(
    group_columns: int, unit_rows: int, count: int, has_feedback: bool
) -> None:
    units, columns, nbits = 5, 6, 3
    W = torch.randn(columns, unit_rows, units)
    scale, zero = torch.rand(2, -(-count // group_columns), units).add_(0.2)
    feedback = torch.randn(count, columns).triu_(1)
    codes = torch.empty(count, unit_rows, units, dtype=torch.uint8)
    errors, found = torch.empty_like(codes, dtype=torch.float32), W.clone()
    quantize_columns(
        found, scale, zero, feedback if has_feedback else None, codes, errors,
        nbits=nbits, group_columns=group_columns,
    )  # fmt: skip
    rest: Tensor = W.clone()
    for column in range(count):
        s, z = scale[column // group_columns], zero[column // group_columns]
        code = (rest[column] / s + z).round().clamp(0, 2**nbits - 1)
        assert torch.equal(codes[column].float(), code)
        if has_feedback:
            error = rest[column] - (code - z) * s
            torch.testing.assert_close(errors[column], error)
            rest = rest + feedback[column, :, None, None] * error
    torch.testing.assert_close(found[count:], rest[count:])
