"""The grid that the weights of a group are rounded to, and sums that do not depend on their order.

A weight must get the same bits no matter which part of it is solved at once, on how many threads,
and whether on a CPU or by a GPU kernel. Each of these chooses its own order of summation, so no
result may depend on a sum of floats. Groups are converted to fixed point instead, because sums of
integers are exact.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class QuantGrid:
    """The codes that n groups may use, and how their scale and zero are stored.

    Solvers see every group divided by `unit`, so that neither huge nor tiny weights overflow or
    underflow.

    Attributes:
        nbits: Bits of a code.
        unit: fp32 [n], the power of two at or below the largest magnitude of each group.
        meta_dtype: Storage dtype of scale and zero.
    """

    nbits: int
    unit: Tensor
    meta_dtype: torch.dtype

    @property
    def max_code(self) -> int:
        """The largest code."""
        return (1 << self.nbits) - 1

    def to_meta_dtype(self, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Convert scale and zero [n] to their storage dtype.

        `scale` is in units; the stored scale is that of the weight itself. If the dtype cannot
        represent the zero (in fp16: weights far from 0 relative to their range), the scale is
        widened such that zero * scale, the distance of code 0 from weight 0, stays the same.
        """
        limits = torch.finfo(self.meta_dtype)
        # The smallest scale: the smallest subnormal of the dtype, but no subnormal of fp32.
        min_scale = max(limits.smallest_normal * limits.eps, 2.0**-126)
        # How far the zero exceeds the dtype: move this factor from the zero to the scale.
        excess = (zero.abs() * (1 / limits.max)).clamp_min(1)
        scale = (scale * self.magnitude * excess).clamp(min_scale, limits.max)
        zero = (zero / excess).clamp(limits.min, limits.max)
        return scale.to(self.meta_dtype), zero.to(self.meta_dtype)

    def as_stored(self, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale (in units) and zero [n] in fp32 as rounded by storage."""
        scale, zero = self.to_meta_dtype(scale, zero)
        return scale.float() / self.magnitude, zero.float()

    def encode(self, W: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return the nearest codes of W [g, n], as floats."""
        return (W * (1 / scale)).add_(zero).round_().clamp_(0, self.max_code)

    def error(self, W: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return the squared error of every group [n], fp64, in squared units."""
        codes = self.encode(W, scale, zero)
        return codes.sub_(zero).mul_(scale).sub_(W).square_().sum(0, dtype=torch.float64)


def power_of_two(x: Tensor) -> Tensor:
    """Return the power of two at or below every x >= 0 (fp32), clamped to [2**-126, 2**126].

    The clamp keeps quotients and products with the result away from underflow and overflow.
    """
    # The exponent bits of fp32, with sign and mantissa cleared, are that power of two.
    exponent_bits = x.view(torch.int32) & 0x7F800000
    return exponent_bits.view(torch.float32).clamp(2.0**-126, 2.0**126)


def group_ranges(W: Tensor) -> tuple[Tensor, Tensor]:
    """Return the minimum and the range of every column of W [g, n], in units.

    The range of a constant group is a tiny positive number instead of 0, so that callers can
    divide by it.
    """
    low = W.amin(0)
    return low, (W.amax(0) - low).clamp_min(2.0**-30)


@dataclass(frozen=True)
class FixedPoint:
    """n groups [g, n] as integers: W = low + x * step, within half a step.

    Attributes:
        x: Integers from 0 to at most 2**(bits + 1), held in float64 [g, n].
        low: Minimum of each group [n], in units.
        step: Resolution of each group [n], a power of two: at most the group's range / 2**bits.
    """

    x: Tensor
    low: Tensor
    step: Tensor

    @classmethod
    def from_float(cls, W: Tensor, bits: int) -> "FixedPoint":
        """Round W [g, n] (fp32, in units) to fixed point."""
        low, width = group_ranges(W)
        step = power_of_two(width) * 2.0**-bits  # a power of two: multiplying by 1 / step is exact
        return cls(((W - low) * (1 / step)).round_().double(), low, step)

    def mean(self) -> Tensor:
        """Return the mean of every group [n], fp32, in units."""
        mean = self.x.sum(0).float() * (1 / len(self.x))
        return self.low + mean * self.step
