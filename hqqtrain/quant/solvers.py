"""Finding the scale and zero of every group: hqq's way, round to nearest, and least squares.

All work on a matrix [group_size, n], one group a column, and are pure functions of each column.
Sums over a group are trees of elementwise additions (`group_sum`): torch's own reductions choose
their order by the shape of the whole tensor and the number of threads, and a weight must get the
same bits whatever part of it is solved at once.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """What the codes of n groups may be, and how their scale and zero will be stored.

    Solvers see every group divided by `unit` [n], the power of two at or below its largest
    magnitude, so that neither huge nor tiny weights overflow or vanish in sums of squares.
    """

    nbits: int
    unit: Tensor
    meta_dtype: torch.dtype

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.nbits) - 1

    def store(self, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero [n] of the weight itself, in the dtype and range of storage."""
        most = torch.finfo(self.meta_dtype).max
        scale = (scale * self.unit).clamp(max=most)
        return scale.to(self.meta_dtype), zero.clamp(-most, most).to(self.meta_dtype)

    def stored(self, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero [n] as they come back from storage: fp32, the scale in units."""
        scale, zero = self.store(scale, zero)
        return scale.float() / self.unit, zero.float()

    def encode(self, W: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The nearest codes, as floats. A scale that was stored as 0 reaches no weight."""
        inverse = torch.where(scale == 0, 0, 1 / scale)
        return (W * inverse).add_(zero).round_().clamp_(0, self.top)


Solver = Callable[[Tensor, Grid], tuple[Tensor, Tensor]]
"""(W [group_size, n] fp32 in units, grid) -> scale [n] in units, zero [n]. No group is constant."""


def group_sum(x: Tensor) -> Tensor:
    """Sum of every column of x [g, n] in an order that depends on g alone. Overwrites x."""
    while (length := x.shape[0]) > 1:
        half = length // 2
        if length % 2:
            x[0] += x[-1]
        x = x[:half].add_(x[half : 2 * half])
    return x[0]


def group_mean(x: Tensor) -> Tensor:
    """Mean of every column of x [g, n]. Overwrites x."""
    return group_sum(x) / x.shape[0]


def rtn(W: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Round to nearest: the codes span the group's range."""
    low = W.amin(0)
    scale = (W.amax(0) - low) / grid.top
    return scale, -low / scale


STARTS = (("middle", (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)), ("mean", (0.75, 0.5)))
"""First ranges of `least_squares`: about what they are centred, shares of the group's range."""

ROUNDS, FINAL_ROUNDS = 6, 12


def least_squares(W: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero fitted jointly: Lloyd's algorithm restricted to evenly spaced levels.

    Rounding to the nearest level and a linear regression of weights on codes take turns, from
    several ranges; each group keeps what errs least with scale and zero as stored. hqq fits the
    zero alone. Which starts: perplexity of the bundled model (`scripts/compare_solvers.py`).
    """
    centred = W - group_mean(W.clone())
    low, high = W.amin(0), W.amax(0)
    mean = W[0] - centred[0]
    starts = [
        (centre, width * share / grid.top)
        for centre, width, shares in _start_table(low, high, mean)
        for share in shares
    ]
    best = None
    for centre, scale in starts:
        best = _better(best, _fit(W, grid, scale, grid.top / 2 - centre / scale, ROUNDS))
    return best


