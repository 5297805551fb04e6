"""Weighted fits, compared with a search over many scales and zeros."""

import pytest
import torch
from torch import Tensor

from hqqtrain.quant.calibrated.fit import weighted_least_squares
from hqqtrain.quant.grid import QuantGrid


def grid_of(nbits: int, n: int, dtype: torch.dtype = torch.float32) -> QuantGrid:
    return QuantGrid(nbits, torch.ones(n), dtype)


def error(W: Tensor, importance: Tensor, grid: QuantGrid, scale: Tensor, zero: Tensor) -> Tensor:
    codes = grid.encode(W, scale, zero)
    return (importance * ((codes - zero) * scale - W).square()).sum(0)


@pytest.mark.parametrize("integer_zero", [False, True])
@pytest.mark.parametrize("nbits", [4, 3, 2, 1])
def test_the_fit_is_nearly_the_best(nbits: int, integer_zero: bool) -> None:
    W, importance = torch.randn(32, 40) * 0.3, torch.rand(32, 1) ** 4 + 0.01
    grid = grid_of(nbits, 40)
    fit = weighted_least_squares(W, importance, grid, integer_zero=integer_zero)
    found = error(W, importance, grid, *fit)
    best = torch.full_like(found, torch.inf)
    zeros = torch.linspace(0, grid.max_code, grid.max_code * (1 if integer_zero else 8) + 1)
    for scale in torch.linspace(0.05, 1.2, 60) * W.abs().amax() * 2 / grid.max_code:
        for zero in zeros:
            one = torch.ones(40)
            best = torch.minimum(best, error(W, importance, grid, scale * one, zero * one))
    assert found.sum() <= 1.12 * best.sum()
    if integer_zero:
        assert torch.equal(fit[1], fit[1].round().clamp(0, grid.max_code))


def test_groups_of_one_sign_with_integer_zeros() -> None:
    W, importance = torch.rand(16, 40) + torch.linspace(0.5, 20, 40), torch.rand(16, 1) + 0.1
    W[:, ::2] *= -1
    grid = grid_of(8, 40)
    found = error(
        W, importance, grid, *weighted_least_squares(W, importance, grid, integer_zero=True)
    )
    end = torch.where(W[0] < 0, grid.max_code, 0.0)
    rounded = error(W, importance, grid, W.abs().amax(0) / grid.max_code, end)
    assert found.sum() <= rounded.sum()


def test_heavy_weights_are_met_more_closely() -> None:
    W, grid = torch.randn(64, 100), grid_of(2, 100)
    importance = torch.ones(64, 1)
    importance[:4] = 1000
    equal = weighted_least_squares(W, torch.ones(64, 1), grid)
    fit = weighted_least_squares(W, importance, grid)
    of_heavy = [error(W[:4], importance[:4], grid, *pair).mean() for pair in (equal, fit)]
    assert of_heavy[1] < 0.3 * of_heavy[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_result_is_as_stored(dtype: torch.dtype) -> None:
    grid = grid_of(3, 20, dtype)
    scale, zero = weighted_least_squares(torch.randn(16, 20), torch.rand(16, 1) + 0.1, grid)
    assert torch.equal(scale, scale.to(dtype).float())
    assert torch.equal(zero, zero.to(dtype).float())


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
@pytest.mark.parametrize("integer_zero", [False, True])
def test_constant_groups(value: float, integer_zero: bool) -> None:
    W, grid = torch.full((8, 3), value), grid_of(2, 3)
    scale, zero = weighted_least_squares(W, torch.ones(8, 1), grid, integer_zero=integer_zero)
    back = (grid.encode(W, scale, zero) - zero) * scale
    assert torch.allclose(back, W, atol=2e-2)
