"""Fit scale and zero of groups whose weights matter unequally."""

import torch
from torch import Tensor

from hqqtrain.quant.grid import QuantGrid, group_ranges
from hqqtrain.quant.solvers.integer_zero import within_codes
from hqqtrain_kernels import backend
from hqqtrain_kernels.solver_params import WeightedFitParams

PARAMS = WeightedFitParams(
    ranges_about_middle=(1.0, 0.9, 0.8, 0.65, 0.5),
    ranges_about_mean=(0.75, 0.5, 0.35),
    rounds=6,
)


def weighted_least_squares(
    W: Tensor, importance: Tensor, grid: QuantGrid, *, integer_zero: bool = False
) -> tuple[Tensor, Tensor]:
    """Fit scale and zero of every column of W, with a weight for each error.

    This is Lloyd's algorithm with evenly spaced levels, from several starting points. The sums are
    sums of floats, so in PyTorch the bits depend on the shape of W: callers use one shape.

    Args:
        W: Groups as columns, fp32 [group_size, n], normalized.
        importance: The weights of squared errors, fp32 [group_size, 1] or [group_size, n].
        grid: The codes, and the storage dtype of scale and zero.
        integer_zero: Whether the zeros must be codes.

    Returns:
        The normalized scale [n] and the zero [n], as stored.
    """
    share = importance / importance.sum(0)
    if backend.use_triton(W.device) and share.shape[1] == 1:
        from hqqtrain_kernels import weighted_fit_triton  # triton is absent on a Mac

        if len(W) <= weighted_fit_triton.MAX_GROUP_SIZE:
            return weighted_fit_triton.weighted_fit(
                W, share, grid.magnitude, nbits=grid.nbits, meta_dtype=grid.meta_dtype,
                meta_min=grid.min_scale, integer_zero=integer_zero, params=PARAMS,
            )  # fmt: skip
    mean = (share * W).sum(0)
    scale, zero = _starts(W, mean, grid)  # [starts, n]
    if integer_zero:
        scale, zero = within_codes(scale, zero.round_(), grid.max_code)
    for last in (*(False,) * (PARAMS.rounds - 1), True):
        codes = _encode(W, scale, zero, grid)
        if integer_zero:
            scale, zero = _integer_fit(W, codes, scale, zero, mean, share, grid, keeps_zero=last)
        else:
            scale, zero = _fit(W, codes, scale, zero, mean, share, grid)
    scale, zero = grid.as_stored(scale, zero)
    residual = (_encode(W, scale, zero, grid) - zero[:, None]).mul_(scale[:, None]).sub_(W)
    best = (share * residual.square_()).sum(1).argmin(0)[None]
    return scale.gather(0, best)[0], zero.gather(0, best)[0]


def _starts(W: Tensor, mean: Tensor, grid: QuantGrid) -> tuple[Tensor, Tensor]:
    """Return scale and zero of every starting point, [starts, n]."""
    low, value_range = group_ranges(W)
    reach = torch.maximum(low + value_range - mean, mean - low).clamp_min(2.0**-30) * 2
    ranges = [value_range * fraction for fraction in PARAMS.ranges_about_middle]
    centers = [low + value_range * 0.5] * len(ranges)
    for fraction in PARAMS.ranges_about_mean:
        ranges.append(reach * fraction)
        centers.append(mean)
    scale = torch.stack(ranges) * (1 / grid.max_code)
    return scale, grid.max_code / 2 - torch.stack(centers) / scale


def _encode(W: Tensor, scale: Tensor, zero: Tensor, grid: QuantGrid) -> Tensor:
    """Return the nearest codes [starts, g, n] of W [g, n] for scale and zero [starts, n]."""
    return (W / scale[:, None]).add_(zero[:, None]).round_().clamp_(0, grid.max_code)


def _fit(
    W: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, mean: Tensor, share: Tensor,
    grid: QuantGrid,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Regress the weights on their codes; where no line fits, keep scale and zero."""
    mean_code = (share * codes).sum(1)
    centered = codes - mean_code[:, None]
    variance = (share * centered * centered).sum(1)
    covariance = (share * centered * (W - mean)).sum(1)
    is_valid = (variance > 0) & (covariance > 0)
    fitted = torch.where(is_valid, covariance / variance.clamp_min(1e-30), scale)
    # Round the scale to its storage dtype first, so that the zero compensates for the rounding.
    fitted, _ = grid.as_stored(fitted, mean_code - mean / fitted)
    return (
        torch.where(is_valid, fitted, scale),
        torch.where(is_valid, mean_code - mean / fitted, zero),
    )


def _integer_fit(
    W: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, mean: Tensor, share: Tensor,
    grid: QuantGrid, *, keeps_zero: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fit the scale for the given integer zero, and then round the best zero for that scale."""
    distance = codes - zero[:, None]
    products, squares = (share * distance * W).sum(1), (share * distance * distance).sum(1)
    is_valid = (products > 0) & (squares > 0)
    scale = torch.where(is_valid, products / squares.clamp_min(1e-30), scale)
    if not keeps_zero:
        mean_code = (share * codes).sum(1)
        zero = (mean_code - mean / scale).round_().clamp_(0, grid.max_code)
    return scale, zero
