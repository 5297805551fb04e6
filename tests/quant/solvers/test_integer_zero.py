"""Integer zeros of every solver: codes, nearly the best scale, and the bits of slices."""

import pytest
import torch

from hqqtrain.quant.error import squared_error
from hqqtrain.quant.grid import QuantGrid
from hqqtrain.quant.quantize import dequantize_weight, quantize_weight
from hqqtrain.quant.solvers.integer_zero import with_integer_zero
from hqqtrain.quant.solvers.registry import SOLVERS
from hqqtrain.quant.spec import QuantSpec


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
def test_zeros_are_codes_and_cost_little(solver: str, axis: int, nbits: int) -> None:
    W = torch.randn(64, 128) * 0.02 + 0.003
    errors = []
    for zero in ("float", "integer"):
        spec = QuantSpec(nbits, 32, axis, solver, torch.float32, zero)
        q = quantize_weight(W, spec)
        if zero == "integer":
            assert torch.equal(q.zero, q.zero.round().clamp(0, 2**nbits - 1))
        back = dequantize_weight(q, spec.layout(*W.shape), torch.float32)
        errors.append(float(squared_error(W, back)[0]))
    assert errors[1] < {8: 1.4, 4: 1.4, 3: 1.5, 2: 2.2, 1: 2.5}[nbits] * errors[0]


@pytest.mark.parametrize("nbits", [4, 2])
def test_the_fit_is_nearly_the_best(nbits: int) -> None:
    W = torch.randn(32, 50) * 0.3 + torch.randn(50) * 0.1
    grid = QuantGrid(nbits, torch.ones(50), torch.float32)
    scale, zero = with_integer_zero(W, grid, *SOLVERS["least_squares"].solve(W, grid))
    found, best = grid.error(W, scale, zero), torch.full((50,), torch.inf, dtype=torch.float64)
    for step in torch.linspace(0.1, 1.1, 80) * 2 * W.abs().max() / grid.max_code:
        for candidate in range(grid.max_code + 1):
            one = torch.ones(50)
            best = torch.minimum(best, grid.error(W, step * one, candidate * one))
    assert found.sum() <= 1.06 * best.sum()


@pytest.mark.parametrize("value", [0.0, 0.7, -0.7, 1e-30, 1e30])
def test_constant_groups(value: float) -> None:
    W = torch.full((4, 32), value)
    spec = QuantSpec(2, 16, 1, "least_squares", torch.bfloat16, "integer")
    back = dequantize_weight(quantize_weight(W, spec), spec.layout(4, 32), torch.float32)
    assert torch.allclose(back, W, rtol=0.01, atol=1e-36)


@pytest.mark.parametrize("nbits", [8, 4])
def test_groups_of_one_sign(nbits: int) -> None:
    """A float zero far outside of the codes: with the nearest code, the scale must be larger."""
    W = torch.rand(16, 40) + torch.linspace(0.5, 20, 40)
    W[:, ::2] *= -1
    grid = QuantGrid(nbits, torch.ones(40), torch.float32)
    found = grid.error(W, *with_integer_zero(W, grid, *SOLVERS["least_squares"].solve(W, grid)))
    end = torch.where(W[0] < 0, grid.max_code, 0.0)
    rounded = grid.error(W, W.abs().amax(0) / grid.max_code, end)
    assert found.sum() <= rounded.sum()


def test_slices_have_the_bits_of_the_whole() -> None:
    W = torch.randn(90, 64)
    spec = QuantSpec(3, 16, 1, "least_squares", torch.bfloat16, "integer")
    whole = quantize_weight(W, spec)
    parts = [quantize_weight(part, spec) for part in W.split([1, 40, 49])]
    for name in ("W_q", "scale", "zero"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name))
