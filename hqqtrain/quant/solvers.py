"""The solvers by name, and the two that are not ours: round to nearest, and hqq's.

A solver is a pure function of every column: it stops per group or after a fixed count, never on
an average over the weight, as hqq does.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hqqtrain.quant.grid import Grid, group_mean, spread
from hqqtrain.quant.least_squares import least_squares

Solver = Callable[[Tensor, Grid], tuple[Tensor, Tensor]]
"""(W [group_size, n] fp32, in units of the grid) -> scale [n] in units, zero [n]."""

HQQ_ROUNDS, HQQ_BETA, HQQ_KAPPA, HQQ_P = 20, 10.0, 1.01, 0.7


def rtn(W: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Round to nearest: the codes span the group's range."""
    low, width = spread(W)
    scale = width / grid.top
    return scale, -low / scale


def hqq(W: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """What hqq 0.2.8 computes in fp32 (`optimize_weights_proximal_legacy`): the zero is fitted.

    Two differences. hqq stops when the mean error of the whole weight stops falling; here every
    group takes its 20 rounds, or fewer once none moves. And hqq maps a group whose range is at
    most 1e-4 to one value, to spare half precision; here it gets its levels like any other.
    """
    low, width = spread(W)
    inverse = _hqq_inverse_scale(width, grid)
    first = zero = -low * inverse
    if grid.nbits == 4:
        zero = zero.round()
    scaled = W * inverse
    for i in range(HQQ_ROUNDS):
        codes = (scaled + zero).round_().clamp_(0, grid.top)
        previous, threshold = zero, HQQ_BETA * HQQ_KAPPA**i
        if live := _can_shrink(first, zero, inverse, grid, threshold):
            kept = W - _shrink(W - (codes - zero) / inverse, grid, threshold)
            zero = group_mean(codes - kept * inverse)
        else:
            zero = group_mean(codes.sub_(scaled))
        if not live and torch.equal(zero, previous):
            break
    return 1 / inverse, zero


def _hqq_inverse_scale(width: Tensor, grid: Grid) -> Tensor:
    inverse = grid.top / width
    capped = torch.minimum(inverse, 2e4 * grid.unit)
    return torch.where(width * grid.unit <= 1e-4, inverse, capped)


def _can_shrink(first: Tensor, zero: Tensor, inverse: Tensor, grid: Grid, beta: float) -> bool:
    """Whether any residual can pass the threshold below which `_shrink` is exactly zero.

    A residual is at most half a step, or as far as the zero has moved; one step of slack. For
    weights of a language model's size none passes, and the powers need not be computed.
    """
    bound = (1 + (zero - first).abs()) / inverse * grid.unit
    return bool((bound > beta ** (-1 / (2 - HQQ_P))).any())


def _shrink(residual: Tensor, grid: Grid, beta: float) -> Tensor:
    """sign(x) * max(|x| - |x|**(p-1) / beta, 0) of residuals in units.

    The power is taken in fp64: the fp32 one differs between vector lanes and remainders.
    """
    x = residual.abs() * grid.unit
    power = x.double().pow_(HQQ_P - 1).float()
    return (x - power / beta).clamp_min_(0).mul_(residual.sign()) / grid.unit


SOLVERS: dict[str, Solver] = {"least_squares": least_squares, "hqq": hqq, "rtn": rtn}
