"""The default solver: scale and zero of every group fitted jointly by least squares.

hqq fits the zero alone and leaves the scale at the group's range; at 3 bits and fewer the best
range is much narrower, and that is most of hqq's error.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hqqtrain.quant.grid import FixedPoint, QuantGrid

LEAST_BITS, MOST_BITS = 14, 20
"""Of a group's range, in fixed point: 14 are enough for 256 levels."""


@dataclass(frozen=True)
class SearchConfig:
    """Where to start and how to move.

    about_middle, about_mean: ranges to start from, as shares of the group's own range, about its
    middle, and of twice its reach, about its mean. rounds from every start, last_rounds from the
    best of them. stride: how far a round moves, in multiples of what the regression asks for. Few
    codes change in a round, so the regression alone creeps: 20 rounds of twice its length end
    with the error that 60 of its own length ended with (bundled model: 0.103 at 2 bits both).
    """

    about_middle: tuple[float, ...] = (0.95, 0.8, 0.65)
    about_mean: tuple[float, ...] = (0.75, 0.5)
    rounds: int = 3
    last_rounds: int = 5
    stride: float = 2.0


SEARCHES = {
    8: SearchConfig(about_middle=(1.0, 0.998, 0.99, 0.97, 0.9), about_mean=()),  # nothing to clip
    1: SearchConfig(about_middle=(0.9, 0.7), rounds=4, last_rounds=4, stride=1.5),
}
"""By nbits, where the usual one is not the best.

Chosen by perplexity of the bundled model (`scripts/compare_solvers.py`), not by weight error,
which hardly tells them apart: at 2 bits strides from 1.25 to 2.5 err the same within 0.5 % and
give perplexities from 52 to 75.
"""


def search_config(nbits: int) -> SearchConfig:
    """How the groups of a weight of `nbits` are searched."""
    return SEARCHES.get(nbits, SearchConfig())


def least_squares(W: Tensor, grid: QuantGrid) -> tuple[Tensor, Tensor]:
    """Scale [n] in units and zero [n] of every column of W [group_size, n] (fp32, in units).

    Lloyd's algorithm with evenly spaced levels: rounding to the nearest level and the regression
    of weights on codes take turns, over-relaxed. A group keeps the fit that errs least.
    """
    fixed = FixedPoint.of(W, fraction_bits(grid.nbits, len(W)))
    plan = search_config(grid.nbits)
    fits = _Fits(fixed.x, grid.top, plan.stride)
    for slope, offset in _starts(fits, plan):
        fits.descend(slope, offset, plan.rounds)
    fits.descend(fits.slope, fits.offset, plan.last_rounds)
    mean, zero = fixed.mean(), fits.mean_code
    scale = fixed.step / (fits.slope * grid.top)
    # The scale is rounded first, and the zero makes up for it.
    scale, _ = grid.stored(scale, zero - mean / scale)
    return scale, zero - mean / scale


def fraction_bits(nbits: int, group_size: int) -> int:
    """As many as let sums of codes times weights fit 32 bits, where that leaves enough of them."""
    room = 30 - nbits - (group_size - 1).bit_length()
    return min(max(room, LEAST_BITS), MOST_BITS)


class _Fits:
    """Weights v as integers about their mean, and the best line so far from them to their codes.

    A line is v * slope + offset: the place of a weight between the lowest code, 0, and the
    highest, 1. Both are fp32 [n]. Sums of integers are exact in float64: no order shows in them.
    """

    def __init__(self, x: Tensor, top: int, stride: float) -> None:
        self.top, self.g, self.stride = top, len(x), stride
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
            moved = slope + self.stride * (fitted - slope)
            slope = torch.where(moved > 0, moved, fitted)
            offset = offset + self.stride * (level - offset)
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


def _starts(fits: _Fits, plan: SearchConfig) -> Iterator[tuple[Tensor, Tensor]]:
    width = (fits.high - fits.low).clamp_min(1)
    middle = fits.low + width * 0.5
    for share in plan.about_middle:
        slope = 1 / (width * share)
        yield slope, 0.5 - middle * slope
    reach = torch.maximum(fits.high, -fits.low).clamp_min(1) * 2
    for share in plan.about_mean:
        slope = 1 / (reach * share)
        yield slope, torch.full_like(slope, 0.5)
