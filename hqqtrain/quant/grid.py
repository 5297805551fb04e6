"""The grid that the weights of a group are rounded to, and sums that do not depend on their order.

A weight must get the same bits whether it is solved in one part or in several, on one thread or on
many, on a CPU or by a GPU kernel. The order of summation differs between these, so no result may
depend on a sum of floats. Groups are converted to fixed point instead, because sums of integers are
exact in any order.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hqqtrain_kernels.reference import min_stored_scale


@dataclass(frozen=True)
class QuantGrid:
    """The codes that n groups may use, and how their scale and zero are stored.

    Solvers see normalized groups: each is divided by its `magnitude`, so that neither huge nor tiny
    weights overflow or underflow. A normalized scale fits normalized weights; the scale of the
    weight itself is scale * magnitude. Codes and zeros are the same for both.

    Attributes:
        nbits: Bits of a code.
        magnitude: fp32 [n], the power of two at or below the largest absolute value of each group.
        meta_dtype: Storage dtype of scale and zero.
    """

    nbits: int
    magnitude: Tensor
    meta_dtype: torch.dtype

    @property
    def max_code(self) -> int:
        """The largest code."""
        return (1 << self.nbits) - 1

    @property
    def min_scale(self) -> float:
        """The smallest scale that is stored."""
        return min_stored_scale(self.meta_dtype)

    def to_meta_dtype(self, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Convert scale and zero [n] to their storage dtype.

        `scale` is normalized; the stored scale is that of the weight itself. fp16 cannot represent
        the zero of a group whose weights are far from 0, compared with their range. The scale is
        then widened by as much as the zero is reduced: zero * scale, the distance of code 0 from
        weight 0, stays the same.
        """
        limits = torch.finfo(self.meta_dtype)
        # The factor by which the zero exceeds the dtype. It moves from the zero to the scale.
        excess = (zero.abs() * (1 / limits.max)).clamp_min(1)
        scale = (scale * self.magnitude * excess).clamp(self.min_scale, limits.max)
        zero = (zero / excess).clamp(limits.min, limits.max)
        return scale.to(self.meta_dtype), zero.to(self.meta_dtype)

    def as_stored(self, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale (normalized) and zero [n] in fp32, as rounded by storage."""
        scale, zero = self.to_meta_dtype(scale, zero)
        return scale.float() / self.magnitude, zero.float()

    def with_constants(self, W: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale (normalized) and zero [n], with those of constant groups in place.

        The scale of a constant group is a power of two, so that code 0 represents its value exactly
        if the dtype of zero can.

        Args:
            W: Groups as columns, fp32 [group_size, n], normalized.
            scale: The normalized scale [n] of the other groups.
            zero: The zero [n] of the other groups.
        """
        is_constant = W.amin(0) == W.amax(0)
        power, _ = self.as_stored(torch.ones_like(scale), torch.zeros_like(zero))
        return (
            torch.where(is_constant, power, scale),
            torch.where(is_constant, -W[0] / power, zero),
        )

    def encode(self, W: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return the nearest codes of W [g, n], as floats."""
        return (W * (1 / scale)).add_(zero).round_().clamp_(0, self.max_code)

    def error(self, W: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return the squared error of every normalized group, fp64 [n]."""
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
    """Return the minimum and the range (maximum - minimum) of every column of W [g, n].

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
        low: Minimum of each group [n], normalized.
        step: Resolution of each group [n], a power of two: at most the group's range / 2**bits.
    """

    x: Tensor
    low: Tensor
    step: Tensor

    @classmethod
    def from_float(cls, W: Tensor, bits: int) -> "FixedPoint":
        """Round W [g, n] (fp32, normalized) to fixed point."""
        low, value_range = group_ranges(W)
        step = power_of_two(value_range) * 2.0**-bits  # so 1 / step is exact
        return cls(((W - low) * (1 / step)).round_().double(), low, step)

    def mean(self) -> Tensor:
        """Return the mean of every normalized group, fp32 [n]."""
        mean = self.x.sum(0).float() * (1 / len(self.x))
        return self.low + mean * self.step
