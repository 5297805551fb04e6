"""The default solver: scale and zero of every group fitted jointly by least squares.

hqq fits the zero alone and leaves the scale at the group's range; at 3 bits and fewer the best
range is much narrower, and that is most of hqq's error.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from hqqtrain.quant.grid import FixedPoint, Grid

LEAST_BITS, MOST_BITS = 14, 20
"""Of a group's range, in fixed point: 14 are enough for 256 levels."""

SHARES_ABOUT_MIDDLE, SHARES_ABOUT_MEAN = (1.0, 0.85, 0.7, 0.55), (0.6,)
SHARES_8_BIT = (1.0, 0.998, 0.99, 0.97, 0.9)
"""The ranges to start from, as shares of a group's own range.

Chosen by perplexity of the bundled model (`scripts/compare_solvers.py`), not by weight error:
more starts lower the error long after they have stopped lowering perplexity. With 256 levels
there is nothing to clip, and a fit moves no further than the next step.
"""

ROUNDS, LAST_ROUNDS = 3, 3
"""From every start, and from the best of them."""

STRIDE = 2.0
"""How far a round moves, in multiples of what the regression asks for.

Few codes change in a round, so the regression alone creeps: 18 rounds of twice its length end
with the error that 60 of its own length ended with (bundled model: 0.1028 at 2 bits both, 0.0273
at 3, 0.0068 at 4). At 2.5 times 1 bit loses, at 3 all do.
"""


def least_squares(W: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale [n] in units and zero [n] of every column of W [group_size, n] (fp32, in units).

    Lloyd's algorithm with evenly spaced levels: rounding to the nearest level and the regression
    of weights on codes take turns, over-relaxed. A group keeps the fit that errs least.
    """
    fixed = FixedPoint.of(W, fraction_bits(grid.nbits, len(W)))
    fits = _Fits(fixed.x, grid.top)
    for slope, offset in _starts(fits, grid.nbits):
        fits.descend(slope, offset, ROUNDS)
    fits.descend(fits.slope, fits.offset, LAST_ROUNDS)
    mean, zero = fixed.mean(), fits.mean_code
    scale = fixed.step / (fits.slope * grid.top)
    # The scale is rounded first, and the zero makes up for it.
    scale, _ = grid.stored(scale, zero - mean / scale)
    return scale, zero - mean / scale


def shares(nbits: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The starts about the middle of the range, and those about the mean."""
    return (SHARES_8_BIT, ()) if nbits == 8 else (SHARES_ABOUT_MIDDLE, SHARES_ABOUT_MEAN)


def fraction_bits(nbits: int, group_size: int) -> int:
    """As many as let sums of codes times weights fit 32 bits, where that leaves enough of them."""
    room = 30 - nbits - (group_size - 1).bit_length()
    return min(max(room, LEAST_BITS), MOST_BITS)


class _Fits:
    """Weights v as integers about their mean, and the best line so far from them to their codes.

    A line is v * slope + offset: the place of a weight between the lowest code, 0, and the
    highest, 1. Both are fp32 [n]. Sums of integers are exact in float64: no order shows in them.
    """

    def __init__(self, x: Tensor, top: int) -> None:
        self.top, self.g = top, len(x)
        total = x.sum(0)
        centre = (total.float() * (1 / self.g)).round().double()
        self.v = x - centre
        self.rest = total - self.g * centre
        self.high, self.low = (x.amax(0) - centre).float(), -centre.float()
        self.mean_rest = self.rest.float() * (1 / self.g)
        self.gain = torch.full_like(self.low, -torch.inf)
        self.slope = self.offset = self.mean_code = torch.ones_like(self.low)

    def descend(self, slope: Tensor, offset: Tensor, rounds: int) -> None:
        """Over-relaxed rounds from a line, then one plain fit, which is kept where it is best."""
        fit = self._fit(slope, offset)
        for _ in range(1, rounds):
            _, fitted, level, _ = fit
            moved = slope + STRIDE * (fitted - slope)
            slope = torch.where(moved > 0, moved, fitted)
            offset = offset + STRIDE * (level - offset)
            fit = self._fit(slope, offset)
        wins = fit[0] > self.gain
        kept = (self.gain, self.slope, self.offset, self.mean_code)
        self.gain, self.slope, self.offset, self.mean_code = (
            torch.where(wins, new, old) for new, old in zip(fit, kept, strict=True)
        )

    def _fit(self, slope: Tensor, offset: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The regression on the nearest codes: how much error it takes away (times g), slope,
        offset, and the mean code. All but the sums is fp32."""
        codes = self._encode(slope, offset)
        n = codes.sum(0)
        variance = (self.g * (codes * codes).sum(0) - n * n).float()
        covariance = (codes * self.v).sum(0).float() * self.g - (n * self.rest).float()
        fits = (covariance > 0) & (variance > 0)
        slope = torch.where(fits, variance / covariance * (1 / self.top), slope)
        mean_code = n.float() * (1 / self.g)
        offset = mean_code * (1 / self.top) - self.mean_rest * slope
        gain = torch.where(fits, covariance * (covariance / variance), 0)
        return gain, slope, offset, mean_code

    def _encode(self, slope: Tensor, offset: Tensor) -> Tensor:
        """The nearest codes, float64. A place is rounded to fp32 once, as by a fused kernel."""
        place = (self.v * slope.double()).add_(offset.double()).float().clamp_(0, 1)
        return place.double().mul_(self.top).round_()


def _starts(fits: _Fits, nbits: int) -> Iterator[tuple[Tensor, Tensor]]:
    width = (fits.high - fits.low).clamp_min(1)
    middle = fits.low + width * 0.5
    about_middle, about_mean = shares(nbits)
    for share in about_middle:
        slope = 1 / (width * share)
        yield slope, 0.5 - middle * slope
    reach = torch.maximum(fits.high, -fits.low).clamp_min(1) * 2
    for share in about_mean:
        slope = 1 / (reach * share)
        yield slope, torch.full_like(slope, 0.5)
