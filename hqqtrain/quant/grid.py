"""The grid that the weights of a group are rounded to, and sums that do not depend on their order.

A weight must get the same bits whatever part of it is solved at once, on any number of threads,
on a CPU or by a kernel on a GPU. So nothing of consequence is a sum of floats, whose order each
of these chooses for itself: groups are put into fixed point, and sums of integers are exact.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class QuantGrid:
    """What the codes of n groups may be, and how their scale and zero will be stored.

    Solvers see every group divided by `unit` [n], the power of two at or below its largest
    magnitude, so that neither huge nor tiny weights overflow or vanish.
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
        excess = (zero.abs() * (1 / limits.max)).clamp_min(1)
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
        return codes.sub_(zero).mul_(scale).sub_(W).square_().sum(0, dtype=torch.float64)


def power_of_two(x: Tensor) -> Tensor:
    """The power of two at or below every x >= 0 (fp32), kept far from under- and overflow."""
    exponent_bits = x.view(torch.int32) & 0x7F800000
    return exponent_bits.view(torch.float32).clamp(2.0**-126, 2.0**126)


def group_ranges(W: Tensor) -> tuple[Tensor, Tensor]:
    """Least weight and range of every column of W [g, n], in units.

    The range of a constant group is a tiny number instead of 0, to divide by.
    """
    low = W.amin(0)
    return low, (W.amax(0) - low).clamp_min(2.0**-30)


@dataclass(frozen=True)
class FixedPoint:
    """n groups [g, n] as integers: W = low + x * step, within half a step.

    x: float64 [g, n], whole numbers from 0 up to at most 2**(bits + 1). low [n] in units, step
    [n] a power of two: at most a 2**bits-th of the group's range.
    """

    x: Tensor
    low: Tensor
    step: Tensor

    @classmethod
    def of(cls, W: Tensor, bits: int) -> "FixedPoint":
        """Rounds W [g, n] (fp32, in units)."""
        low, width = group_ranges(W)
        step = power_of_two(width) * 2.0**-bits
        return cls(((W - low) * (1 / step)).round_().double(), low, step)

    def mean(self) -> Tensor:
        """Mean [n] of every group, fp32, in units."""
        mean = self.x.sum(0).float() * (1 / len(self.x))
        return self.low + mean * self.step
