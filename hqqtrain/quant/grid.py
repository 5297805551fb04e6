"""The grid that the weights of a group are rounded to, and sums that do not depend on slicing."""

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
        """Scale and zero [n] of the weight itself, in the dtype and range of storage.

        Where the dtype cannot hold the zero (weights far from 0 for their range, in fp16), a
        wider scale keeps zero * scale, the level of code 0.
        """
        limits = torch.finfo(self.meta_dtype)
        least = max(limits.smallest_normal * limits.eps, 2.0**-126)
        excess = (zero.abs() / limits.max).clamp_min(1)
        scale = (scale * self.unit * excess).clamp(least, limits.max)
        zero = (zero / excess).clamp(limits.min, limits.max)
        return scale.to(self.meta_dtype), zero.to(self.meta_dtype)

    def stored(self, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero [n] as they come back from storage: fp32, the scale in units."""
        scale, zero = self.store(scale, zero)
        return scale.float() / self.unit, zero.float()

    def encode(self, W: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The nearest codes, as floats."""
        return (W * (1 / scale)).add_(zero).round_().clamp_(0, self.top)

    def error(self, W: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Squared error [n] of every group, in units, with its nearest codes."""
        codes = self.encode(W, scale, zero)
        return group_sum(codes.sub_(zero).mul_(scale).sub_(W).square_())


def power_of_two(x: Tensor) -> Tensor:
    """The power of two at or below every x >= 0 (fp32), kept far from under- and overflow."""
    exponent_bits = x.view(torch.int32) & 0x7F800000
    return exponent_bits.view(torch.float32).clamp(2.0**-126, 2.0**126)


def group_sum(x: Tensor) -> Tensor:
    """Sum of every column of x [g, n] in an order that depends on g alone. Overwrites x.

    A tree of elementwise additions: torch's own reductions choose their order by the shape of
    the whole tensor and the number of threads, and a weight must get the same bits whatever part
    of it is solved at once.
    """
    while (length := x.shape[0]) > 1:
        half = length // 2
        if length % 2:
            x[0] += x[-1]
        x = x[:half].add_(x[half : 2 * half])
    return x[0]


def group_mean(x: Tensor) -> Tensor:
    """Mean of every column of x [g, n]. Overwrites x.

    Times the reciprocal, which is how CUDA divides by a number: so CPU and GPU agree.
    """
    return group_sum(x) * (1 / x.shape[0])


def spread(W: Tensor) -> tuple[Tensor, Tensor]:
    """Least weight and range of every column of W [g, n], in units.

    The range of a constant group is a tiny number instead of 0, to divide by.
    """
    low = W.amin(0)
    return low, (W.amax(0) - low).clamp_min(2.0**-30)


Fit = tuple[Tensor, Tensor, Tensor]
"""Squared error, scale (in units) and zero of every group, each [n]."""


def better(best: Fit, other: Fit) -> Fit:
    """Of two fits of every group, the one that errs less."""
    wins = other[0] < best[0]
    error, scale, zero = (torch.where(wins, new, old) for new, old in zip(other, best, strict=True))
    return error, scale, zero
