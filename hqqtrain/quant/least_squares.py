"""The default solver: scale and zero of every group fitted jointly by least squares.

hqq fits the zero alone and leaves the scale at the group's range; at 3 bits and fewer the best
range is much narrower, and that is most of hqq's error.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from hqqtrain.quant.grid import Fit, Grid, better, group_mean, group_sum, spread

SHARES_ABOUT_MIDDLE = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
SHARES_ABOUT_MIDDLE_8_BIT = (1.0, 0.998, 0.995, 0.99, 0.97, 0.9)
SHARES_ABOUT_MEAN = (0.75, 0.5)
"""The ranges to start from, as shares of a group's own range.

Chosen by perplexity of the bundled model (`scripts/compare_solvers.py`), not by weight error:
more starts lower the error long after they have stopped lowering perplexity. With 256 levels
there is nothing to clip, and a fit moves no further than the next step.
"""

ROUNDS, LAST_ROUNDS = 6, 12
"""From every start, and from the best of them."""


def least_squares(W: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale [n] in units and zero [n] of every column of W [group_size, n] (fp32, in units).

    Lloyd's algorithm with evenly spaced levels: rounding to the nearest level and the regression
    of weights on codes take turns. A group keeps the start that errs least with scale and zero as
    they will be stored, and goes on from there.
    """
    mean = group_mean(W.clone())
    centred = W - mean
    best = torch.full_like(mean, torch.inf), torch.ones_like(mean), mean
    for scale, zero in _starts(centred, grid):
        scale, zero = _alternate(centred, grid, scale, zero, ROUNDS)
        best = better(best, _as_stored(W, mean, grid, scale, zero))
    _, scale, zero = best
    scale, zero = _alternate(centred, grid, scale, zero + mean / scale, LAST_ROUNDS)
    _, scale, zero = better(best, _as_stored(W, mean, grid, scale, zero))
    return scale, zero


def _starts(centred: Tensor, grid: Grid) -> Iterator[tuple[Tensor, Tensor]]:
    low, width = spread(centred)
    middle, about_mean = low + width / 2, 2 * torch.maximum(low + width, -low)
    for share in SHARES_ABOUT_MIDDLE_8_BIT if grid.nbits == 8 else SHARES_ABOUT_MIDDLE:
        scale = width * (share / grid.top)
        yield scale, grid.top / 2 - middle / scale
    for share in SHARES_ABOUT_MEAN:
        yield about_mean * (share / grid.top), torch.full_like(low, grid.top / 2)


def _alternate(
    centred: Tensor, grid: Grid, scale: Tensor, zero: Tensor, rounds: int
) -> tuple[Tensor, Tensor]:
    """Up to `rounds` turns; a group that no longer moves is at its fixed point for good."""
    for _ in range(rounds):
        before = scale, zero
        scale, zero = _regress(centred, grid.encode(centred, scale, zero), scale)
        if torch.equal(scale, before[0]) and torch.equal(zero, before[1]):
            break
    return scale, zero


def _regress(centred: Tensor, codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The line through (code, weight) of every group; weights of mean 0 make it short."""
    zero = group_mean(codes.clone())
    codes = codes.sub_(zero)
    covariance = group_sum(codes * centred)
    variance = group_sum(codes.square_())
    return torch.where(covariance > 0, covariance / variance, scale), zero


def _as_stored(W: Tensor, mean: Tensor, grid: Grid, scale: Tensor, zero: Tensor) -> Fit:
    """Error, scale and zero, as stored, for W itself, of a fit to the centred weights.

    The scale is rounded first, and the zero makes up for it.
    """
    scale, _ = grid.stored(scale, zero - mean / scale)
    scale, zero = grid.stored(scale, zero - mean / scale)
    return grid.error(W, scale, zero), scale, zero
