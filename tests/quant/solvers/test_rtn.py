"""Rounding to nearest: the codes span the range of a group, and no weight is off by half a step."""

import pytest
import torch

from hqqtrain.quant.grid import QuantGrid
from hqqtrain.quant.solvers.rtn import rtn


@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
def test_codes_span_the_range_and_errors_are_at_most_half_a_step(nbits: int) -> None:
    W = torch.randn(65, 9)
    grid = QuantGrid(nbits, torch.ones(9), torch.float32)
    scale, zero = rtn(W, grid)
    codes = grid.encode(W, scale, zero)
    assert (codes.amin(0) == 0).all()
    assert (codes.amax(0) == grid.max_code).all()
    back = (codes - zero) * scale
    assert ((back - W).abs() <= scale * 0.5001).all()


def test_a_constant_group_has_a_scale_to_divide_by() -> None:
    scale, zero = rtn(torch.full((8, 1), 1.5), QuantGrid(4, torch.ones(1), torch.float32))
    assert scale > 0
    assert zero.isfinite()
