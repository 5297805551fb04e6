"""The least-squares solver compared with rounding to nearest, with exact grids and brute force."""

import pytest
import torch

from hqqtrain.quant.grid import QuantGrid
from hqqtrain.quant.solvers.least_squares import (
    MAX_FRACTION_BITS,
    MIN_FRACTION_BITS,
    fraction_bits,
    least_squares,
)
from hqqtrain.quant.solvers.rtn import rtn

ALL_BITS = (8, 4, 3, 2, 1)


def grid_for(nbits: int, n: int) -> QuantGrid:
    return QuantGrid(nbits, torch.ones(n), torch.float32)


@pytest.mark.parametrize("nbits", ALL_BITS)
def test_errors_are_below_those_of_rounding_to_nearest(nbits: int) -> None:
    W = torch.randn(64, 200)
    W[:, :20] = W[:, :20] ** 3  # heavy tails
    W = W / W.abs().amax()
    grid = grid_for(nbits, 200)
    error, baseline = (grid.error(W, *solve(W, grid)) for solve in (least_squares, rtn))
    # The search starts from narrowed ranges, so a single group may come out slightly worse.
    assert (error <= baseline * 1.2).all()
    assert (error <= baseline).double().mean() > 0.9
    assert error.sum() < baseline.sum() * {8: 1.0, 4: 0.9, 3: 0.8, 2: 0.7, 1: 0.5}[nbits]


@pytest.mark.parametrize("nbits", [4, 3, 2])
def test_weights_on_a_grid_come_back(nbits: int) -> None:
    codes = torch.arange(2.0**nbits).repeat(4)[:, None]
    W = ((codes - 1.3) * 0.04).expand(-1, 3).contiguous()
    scale, zero = least_squares(W, grid_for(nbits, 3))
    torch.testing.assert_close(scale, torch.full((3,), 0.04), rtol=1e-4, atol=0)
    torch.testing.assert_close(zero, torch.full((3,), 1.3), rtol=0, atol=1e-3)


def test_nearly_the_best_split_of_a_group_at_1_bit() -> None:
    """At 1 bit the optimum splits the sorted weights into two halves with their means as levels."""
    W = torch.randn(16, 50) / 4
    best = torch.full((50,), torch.inf, dtype=torch.float64)
    ordered = W.double().sort(0).values
    for split in range(1, 16):
        parts = (ordered[:split], ordered[split:])
        error = sum((part - part.mean(0)).square().sum(0) for part in parts)
        best = torch.minimum(best, error)
    grid = grid_for(1, 50)
    error = grid.error(W, *least_squares(W, grid))
    assert (error >= best * (1 - 1e-4)).all()
    assert error.sum() <= best.sum() * 1.1


@pytest.mark.parametrize("nbits", ALL_BITS)
@pytest.mark.parametrize("group_size", [1, 8, 64, 1024, 1 << 15])
def test_sums_of_codes_times_weights_fit_into_32_bits(nbits: int, group_size: int) -> None:
    bits = fraction_bits(nbits, group_size)
    assert MIN_FRACTION_BITS <= bits <= MAX_FRACTION_BITS
    # Centered weights are below 2**(bits + 1) in magnitude.
    if bits > MIN_FRACTION_BITS:
        assert group_size * ((1 << nbits) - 1) * 2 ** (bits + 1) < 1 << 31
