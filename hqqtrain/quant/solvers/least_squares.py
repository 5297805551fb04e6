"""The default solver: fit scale and zero of every group jointly by least squares.

hqq fits the zero alone and keeps the scale at the group's full range. At 3 bits and fewer the
best range is much narrower, and the wide range causes most of hqq's error.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hqqtrain.quant.grid import FixedPoint, QuantGrid

MIN_FRACTION_BITS, MAX_FRACTION_BITS = 14, 20
"""Bounds of the number of fixed-point bits that resolve a group's range.

14 bits are enough for 256 levels.
"""


@dataclass(frozen=True)
class SearchConfig:
    """Starting points and step size of the least-squares search.

    Few codes change in a round, so the plain regression converges slowly. 20 rounds that are
    over-relaxed by a factor of 2 reach the error that 60 plain rounds reach (bundled model at
    2 bits: 0.103 for both).

    Attributes:
        ranges_about_middle: Initial ranges, centered on the middle of the group's range, as
            fractions of that range.
        ranges_about_mean: Initial ranges, centered on the group's mean, as fractions of twice the
            largest distance from the mean.
        rounds: Rounds from every starting point.
        last_rounds: Further rounds from the best fit of all starting points.
        relaxation: Over-relaxation factor: the step of a round as a multiple of the step that the
            regression proposes.
    """

    ranges_about_middle: tuple[float, ...] = (0.95, 0.8, 0.65)
    ranges_about_mean: tuple[float, ...] = (0.75, 0.5)
    rounds: int = 3
    last_rounds: int = 5
    relaxation: float = 2.0


SEARCHES = {
    # At 8 bits hardly anything is gained by clipping: the ranges are close to the full one.
    8: SearchConfig(ranges_about_middle=(1.0, 0.998, 0.99, 0.97, 0.9), ranges_about_mean=()),
    1: SearchConfig(ranges_about_middle=(0.9, 0.7), rounds=4, last_rounds=4, relaxation=1.5),
}
"""Searches by nbits, where another one than the default is best.

They were chosen by the perplexity of the bundled model (`scripts/compare_solvers.py`). The weight
error hardly distinguishes the candidates: at 2 bits, relaxation factors from 1.25 to 2.5 give
errors within 0.5 % of each other, and perplexities from 52 to 75.
"""


def search_config(nbits: int) -> SearchConfig:
    """Return the search for weights of `nbits` bits."""
    return SEARCHES.get(nbits, SearchConfig())


def least_squares(W: Tensor, grid: QuantGrid) -> tuple[Tensor, Tensor]:
    """Fit scale and zero of every column of W by over-relaxed Lloyd iterations.

    This is Lloyd's algorithm with evenly spaced levels: it alternates between rounding the weights
    to their nearest levels and regressing the weights on the resulting codes. Every group keeps
    the fit with the smallest error.

    Args:
        W: Groups as columns, fp32 [group_size, n], normalized.
        grid: The codes, and the storage dtype of scale and zero.

    Returns:
        The normalized scale [n] and the zero [n].
    """
    fixed = FixedPoint.from_float(W, fraction_bits(grid.nbits, len(W)))
    settings = search_config(grid.nbits)
    search = _LineSearch(fixed.x, grid.max_code, settings.relaxation)
    for slope, offset in _starting_lines(search, settings):
        search.descend(slope, offset, settings.rounds)
    search.descend(search.best.slope, search.best.offset, settings.last_rounds)
    # The regression passes through the means, so (mean_code - zero) * scale is the group's mean.
    mean, mean_code = fixed.mean(), search.best.mean_code
    scale = fixed.step / (search.best.slope * grid.max_code)
    # Round the scale to its storage dtype first, so that the zero compensates for the rounding.
    scale, _ = grid.as_stored(scale, mean_code - mean / scale)
    return scale, mean_code - mean / scale


def fraction_bits(nbits: int, group_size: int) -> int:
    """Return the fixed-point bits for groups of `group_size` weights.

    Sums of codes times weights then fit into 32 bits, unless that would leave fewer than
    `MIN_FRACTION_BITS`.
    """
    # A fixed-point weight has one bit more than this result, its product with a code nbits more,
    # and a sum of products log2(group_size) more. 31 bits are available, and a sign.
    bits = 30 - nbits - (group_size - 1).bit_length()
    return min(max(bits, MIN_FRACTION_BITS), MAX_FRACTION_BITS)


class _Fit(NamedTuple):
    """The line regressed on the codes of a rounding, and the gain of that rounding; fp32 [n].

    Attributes:
        gain: Squared error that the regression on the codes removes, times the group size.
        slope: Slope of the line: see `_LineSearch`.
        offset: Offset of the line.
        mean_code: Mean of the codes.
    """

    gain: Tensor
    slope: Tensor
    offset: Tensor
    mean_code: Tensor


class _LineSearch:
    """The search for the best line from the weights of every group to their codes.

    The line maps a centered integer weight v to its place, v * slope + offset: 0 is the lowest
    code and 1 the highest. Sums over a group add integers in float64. They are exact, so the order
    of summation cannot change them.
    """

    def __init__(self, x: Tensor, max_code: int, relaxation: float) -> None:
        self.max_code, self.group_size, self.relaxation = max_code, len(x), relaxation
        # Center the integers on their rounded mean: products stay small, and v stays an integer.
        total = x.sum(0)
        center = (total.float() * (1 / self.group_size)).round().double()
        self.v = x - center
        self.v_sum = total - self.group_size * center  # not 0, because the center is rounded
        self.high, self.low = (x.amax(0) - center).float(), -center.float()
        self.v_mean = self.v_sum.float() * (1 / self.group_size)
        ones = torch.ones_like(self.low)  # never used: any fit has a larger gain
        self.best = _Fit(torch.full_like(self.low, -torch.inf), ones, ones, ones)

    def descend(self, slope: Tensor, offset: Tensor, rounds: int) -> None:
        """Improve a line by `rounds` fits, and keep the last fit in the groups where it is best."""
        fit = self._fit(slope, offset)
        for _ in range(1, rounds):
            # Over-relax: step `relaxation` times as far as the regression proposes. A slope that
            # would turn negative takes the regression's own value instead.
            relaxed_slope = slope + self.relaxation * (fit.slope - slope)
            slope = torch.where(relaxed_slope > 0, relaxed_slope, fit.slope)
            offset = offset + self.relaxation * (fit.offset - offset)
            fit = self._fit(slope, offset)
        # The last fit is a plain regression, without over-relaxation. Select per group.
        is_better = fit.gain > self.best.gain
        self.best = _Fit(
            *(torch.where(is_better, new, old) for new, old in zip(fit, self.best, strict=True))
        )

    def _fit(self, slope: Tensor, offset: Tensor) -> _Fit:
        """Round the weights to codes by a line, and fit the next line to weights and codes."""
        # Nearest codes. The place is rounded to fp32 once, as the fused kernel does.
        place = (self.v * slope.double()).add_(offset.double()).float().clamp_(0, 1)
        codes = place.double().mul_(self.max_code).round_()
        # g^2 times the variance of the codes and their covariance with v. The sums are exact
        # integers. The variance is rounded to fp32 once, each term of the covariance by itself.
        code_sum = codes.sum(0)
        variance = (self.group_size * (codes * codes).sum(0) - code_sum * code_sum).float()
        products = (codes * self.v).sum(0).float()
        covariance = products * self.group_size - (code_sum * self.v_sum).float()
        # v = mean + (code - mean_code) * covariance / variance. Inverted, it gives the next line.
        # If all codes are equal or fall with the weights, no line fits: keep the slope, gain 0.
        is_valid = (covariance > 0) & (variance > 0)
        slope = torch.where(is_valid, variance / covariance * (1 / self.max_code), slope)
        mean_code = code_sum.float() * (1 / self.group_size)
        offset = mean_code * (1 / self.max_code) - self.v_mean * slope
        gain = torch.where(is_valid, covariance * (covariance / variance), 0)
        return _Fit(gain, slope, offset, mean_code)


def _starting_lines(search: _LineSearch, settings: SearchConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield slope and offset of the lines that the search starts from."""
    # Narrowed ranges about the middle of the group's range.
    value_range = (search.high - search.low).clamp_min(1)
    middle = search.low + value_range * 0.5
    for fraction in settings.ranges_about_middle:
        slope = 1 / (value_range * fraction)
        yield slope, 0.5 - middle * slope
    # Symmetric ranges about the mean, which is at v = 0.
    symmetric_range = torch.maximum(search.high, -search.low).clamp_min(1) * 2
    for fraction in settings.ranges_about_mean:
        slope = 1 / (symmetric_range * fraction)
        yield slope, torch.full_like(slope, 0.5)
