"""The solver of hqq 0.2.8: it fits the zero of every group by half-quadratic splitting."""

from collections.abc import Iterator

import torch
from torch import Tensor

from hqqtrain.quant.grid import FixedPoint, QuantGrid, group_ranges

HQQ_ROUNDS, HQQ_BETA, HQQ_P = 20, 10.0, 0.7
"""Of hqq 0.2.8, where beta does not grow: the line that multiplied it by kappa was lost."""

HQQ_BITS, HQQ_SHRUNK_BITS = 20, 13
"""Fixed point in which the mean of a group, and of what is shrunk from it, are taken."""

HQQ_NUDGES = (0.0, 1e-6, -1e-6)


def hqq(W: Tensor, grid: QuantGrid) -> tuple[Tensor, Tensor]:
    """What hqq 0.2.8 computes in fp32 (`optimize_weights_proximal_legacy`): the zero is fitted.

    Two differences. hqq stops when the mean error of the whole weight stops falling; here every
    group takes its 20 rounds, or fewer once none moves, and at 1 bit, where a later round can be
    worse, keeps its best. And hqq maps a group whose range is at most 1e-4 to one value, to spare
    half precision; here it gets its levels like any other.
    """
    low, width = group_ranges(W)
    inverse = _hqq_inverse_scale(width, grid)
    first = -low * inverse
    scale = 1 / inverse
    if grid.nbits > 1:
        *_, zero = _hqq_zeros(W, inverse, first, grid)
        return scale, zero
    least, best = torch.full_like(scale, torch.inf), first
    # bf16 weights often lie exactly between two codes, where rounding noise decides: try both.
    for nudge in HQQ_NUDGES:
        for zero in _hqq_zeros(W, inverse, first, grid, nudge):
            error = grid.error(W, scale, zero)
            best = torch.where(error < least * (1 - 1e-12), zero, best)  # rounding decides nothing
            least = torch.minimum(error, least)
    return scale, best


def _hqq_zeros(
    W: Tensor, inverse: Tensor, first: Tensor, grid: QuantGrid, nudge: float = 0
) -> Iterator[Tensor]:
    """The zero after every round: the one that fits the last codes, but for what is shrunk."""
    zero = first.round() if grid.nbits == 4 else first
    mean, scaled = FixedPoint.of(W, HQQ_BITS).mean() * inverse, W * inverse
    for _ in range(HQQ_ROUNDS):
        previous = zero
        codes = (scaled + (zero + nudge)).round_().clamp_(0, grid.top)
        zero = codes.sum(0, dtype=torch.float64).float() * (1 / len(W)) - mean
        if _can_shrink(first, previous, inverse, grid):
            shrunk = _shrink(W - (codes - previous) / inverse, grid) * inverse
            shrunk = (shrunk * 2.0**HQQ_SHRUNK_BITS).double().round_().sum(0)
            zero = zero + shrunk.float() * (2.0**-HQQ_SHRUNK_BITS / len(W))
        yield zero
        if torch.equal(zero, previous):
            break


def _hqq_inverse_scale(width: Tensor, grid: QuantGrid) -> Tensor:
    inverse = grid.top / width
    capped = torch.minimum(inverse, 2e4 * grid.unit)
    return torch.where(width * grid.unit <= 1e-4, inverse, capped)


def _can_shrink(first: Tensor, zero: Tensor, inverse: Tensor, grid: QuantGrid) -> bool:
    """Whether any residual can pass the threshold below which `_shrink` is exactly zero.

    A residual is at most half a step, or as far as the zero has moved, and rounding. For weights
    of a language model's size none passes, and the powers need not be computed.
    """
    bound = 1.01 * (zero - first).abs().clamp_min(0.5) / inverse * grid.unit
    return bool((bound > HQQ_BETA ** (-1 / (2 - HQQ_P))).any())


def _shrink(residual: Tensor, grid: QuantGrid) -> Tensor:
    """sign(x) * max(|x| - |x|**(p-1) / beta, 0) of residuals in units.

    The power is taken in fp64: the fp32 one differs between vector lanes and remainders.
    """
    x = residual.abs() * grid.unit
    power = x.double().pow_(HQQ_P - 1).float()
    return (x - power * (1 / HQQ_BETA)).clamp_min_(0).mul_(residual.sign()) / grid.unit
