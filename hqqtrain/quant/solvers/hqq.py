"""The solver of hqq 0.2.8: it fits the zero of every group by half-quadratic splitting."""

from collections.abc import Iterator

import torch
from torch import Tensor

from hqqtrain.quant.grid import FixedPoint, QuantGrid, group_ranges

HQQ_ROUNDS, HQQ_BETA, HQQ_P = 20, 10.0, 0.7
"""The constants of hqq 0.2.8. Beta stays constant over the rounds there, too, although hqq has a
parameter kappa to multiply it by: no line of hqq 0.2.8 does so.
"""

HQQ_BITS, HQQ_SHRUNK_BITS = 20, 13
"""Fixed-point bits for the mean of a group, and for the mean of its shrunk residuals."""

HQQ_NUDGES = (0.0, 1e-6, -1e-6)
"""Offsets of the zero that the 1-bit solver tries, to round ties between two codes either way."""


def hqq(W: Tensor, grid: QuantGrid) -> tuple[Tensor, Tensor]:
    """Fit the zero as hqq 0.2.8 does in fp32 (`optimize_weights_proximal_legacy`).

    The result differs from hqq's in two ways:

    * hqq stops when the mean error over the whole weight no longer falls. Here every group runs
      all 20 rounds, or fewer if no zero moves any more. At 1 bit a later round can be worse, so
      each group keeps its best round.
    * hqq maps a group whose range is at most 1e-4 to a single value, to spare half precision.
      Here such a group gets its levels like any other.
    """
    low, value_range = group_ranges(W)
    inverse_scale = _hqq_inverse_scale(value_range, grid)
    initial_zero = -low * inverse_scale
    scale = 1 / inverse_scale
    if grid.nbits > 1:
        *_, zero = _hqq_zeros(W, inverse_scale, initial_zero, grid)
        return scale, zero
    least_error, best_zero = torch.full_like(scale, torch.inf), initial_zero
    # bf16 weights often lie exactly between two codes, where rounding noise decides. Try both ways.
    for nudge in HQQ_NUDGES:
        for zero in _hqq_zeros(W, inverse_scale, initial_zero, grid, nudge):
            error = grid.error(W, scale, zero)
            # The margin keeps rounding errors of this sum from deciding.
            is_better = error < least_error * (1 - 1e-12)
            best_zero = torch.where(is_better, zero, best_zero)
            least_error = torch.minimum(error, least_error)
    return scale, best_zero


def _hqq_zeros(
    W: Tensor, inverse_scale: Tensor, initial_zero: Tensor, grid: QuantGrid, nudge: float = 0
) -> Iterator[Tensor]:
    """Yield the zero [n] after every round: the mean of codes - (W - shrunk residual) / scale.

    A round is a half-quadratic step. The residual of the current codes is shrunk toward 0, which
    models it as sparse noise, and the zero is refitted to what remains of the weights.
    """
    zero = initial_zero.round() if grid.nbits == 4 else initial_zero
    scaled_mean = FixedPoint.from_float(W, HQQ_BITS).mean() * inverse_scale
    scaled = W * inverse_scale
    for _ in range(HQQ_ROUNDS):
        previous = zero
        codes = (scaled + (zero + nudge)).round_().clamp_(0, grid.max_code)
        # The mean over a group of codes - W / scale. Sums of codes are exact in any order.
        zero = codes.sum(0, dtype=torch.float64).float() * (1 / len(W)) - scaled_mean
        if _can_shrink(initial_zero, previous, inverse_scale, grid):
            residual = W - (codes - previous) / inverse_scale
            shrunk = _shrink(residual, grid) * inverse_scale
            # Sum in fixed point, which is exact in any order, too.
            shrunk = (shrunk * 2.0**HQQ_SHRUNK_BITS).double().round_().sum(0)
            zero = zero + shrunk.float() * (2.0**-HQQ_SHRUNK_BITS / len(W))
        yield zero
        if torch.equal(zero, previous):
            break


def _hqq_inverse_scale(value_range: Tensor, grid: QuantGrid) -> Tensor:
    """Return max_code / range, capped at 2e4 as in hqq, unless the range is at most 1e-4."""
    inverse_scale = grid.max_code / value_range
    capped = torch.minimum(inverse_scale, 2e4 * grid.magnitude)
    return torch.where(value_range * grid.magnitude <= 1e-4, inverse_scale, capped)


def _can_shrink(initial_zero: Tensor, zero: Tensor, inverse_scale: Tensor, grid: QuantGrid) -> bool:
    """Whether any residual can exceed the threshold below which `_shrink` returns exactly 0.

    A residual is at most half a code, or the distance that the zero has moved, plus rounding. The
    weights of a language model are so small that hardly any residual exceeds the threshold, and the
    powers need not be computed.
    """
    bound = 1.01 * (zero - initial_zero).abs().clamp_min(0.5) / inverse_scale * grid.magnitude
    return bool((bound > HQQ_BETA ** (-1 / (2 - HQQ_P))).any())


def _shrink(residual: Tensor, grid: QuantGrid) -> Tensor:
    """Return sign(x) * max(|x| - |x|**(p-1) / beta, 0) of the residuals x, normalized again.

    The argument is normalized, while x are the residuals of the weight itself. The power is
    computed in fp64, because in fp32 its bits differ between the vectorized part of a loop and the
    remainder.
    """
    x = residual.abs() * grid.magnitude
    power = x.double().pow_(HQQ_P - 1).float()
    return (x - power * (1 / HQQ_BETA)).clamp_min_(0).mul_(residual.sign()) / grid.magnitude
