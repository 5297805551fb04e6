"""Integer zeros, as engines for GPTQ and AWQ checkpoints store them.

Rounding the zero of a float fit shifts all levels of its group by up to half a code. So the scale
is fitted again for each of the two integers next to the zero.
"""

import torch
from torch import Tensor

from hqqtrain.quant.grid import FixedPoint, QuantGrid
from hqqtrain.quant.solvers.least_squares import fraction_bits

ROUNDS = 3
"""Rounds of rounding the weights and fitting the scale, for each of the two zeros."""


def with_integer_zero(
    W: Tensor, grid: QuantGrid, scale: Tensor, zero: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the best scale [n] with an integer zero [n] next to that of a float fit.

    The sums are sums of integers, so they do not depend on the order of the weights.

    Args:
        W: Groups as columns, fp32 [group_size, n], normalized.
        grid: The codes, and the storage dtype of scale and zero.
        scale: The normalized scale [n] of the fit.
        zero: The zero [n] of the fit.
    """
    fixed = FixedPoint.from_float(W, fraction_bits(grid.nbits, len(W)))
    # A group of equal weights c has no range to fit. One level at distance max_code gives c.
    first, is_constant = W[0], W.amin(0) == W.amax(0)
    scale = torch.where(is_constant, first.abs() / grid.max_code, scale).clamp_min(2.0**-40)
    zero = torch.where(is_constant, torch.where(first > 0, 0.0, float(grid.max_code)), zero)
    scale, _ = within_codes(scale, zero, grid.max_code)
    best_gain = torch.full_like(scale, -torch.inf, dtype=torch.float64)
    best_scale, best_zero = scale, zero
    for candidate in (zero.floor(), zero.floor() + 1):
        candidate = candidate.clamp(0, grid.max_code)
        gain, fitted = _fit_scale(W, fixed, grid, scale, candidate)
        is_better = gain > best_gain
        best_gain = torch.where(is_better, gain, best_gain)
        best_scale = torch.where(is_better, fitted, best_scale)
        best_zero = torch.where(is_better, candidate, best_zero)
    return best_scale, best_zero


def within_codes(scale: Tensor, zero: Tensor, max_code: int) -> tuple[Tensor, Tensor]:
    """Clamp zeros to the codes, and widen the scale so that the levels reach as far from 0.

    All levels of a zero outside of the codes have one sign. With the nearest code as zero, they
    would reach less far, and all weights of the group would get the last code.
    """
    reach = torch.where(zero < 0, max_code - zero, zero.clamp_min(max_code))
    return scale * (reach / max_code), zero.clamp(0, max_code)


def _fit_scale(
    W: Tensor, fixed: FixedPoint, grid: QuantGrid, scale: Tensor, zero: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gain fp64 [n] and the stored scale [n] of the best scale for given zeros.

    The gain is by how much the fit reduces the sum of squares of the weights.
    """
    for _ in range(ROUNDS):
        products, squares = _sums(W, fixed, grid, scale, zero)
        is_valid = (products > 0) & (squares > 0)
        scale = torch.where(is_valid, (products / squares.clamp_min(1)).float(), scale)
    scale, zero = grid.as_stored(scale, zero)
    products, squares = _sums(W, fixed, grid, scale, zero)
    stored = scale.double()
    return stored * (2 * products - stored * squares), scale


def _sums(
    W: Tensor, fixed: FixedPoint, grid: QuantGrid, scale: Tensor, zero: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the sums of w (code - zero) and of (code - zero)^2 of every group, fp64 [n]."""
    distance = (grid.encode(W, scale, zero) - zero).double()
    products = fixed.low.double() * distance.sum(0)
    products += fixed.step.double() * (distance * fixed.x).sum(0)
    return products, distance.square().sum(0)
