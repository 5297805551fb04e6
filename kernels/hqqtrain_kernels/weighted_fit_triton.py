"""Fit scale and zero of groups whose columns weigh unequally.

PyTorch launches about 150 kernels for the groups of a few columns, and writes every starting point
of every weight to memory in each. This kernel keeps some groups in registers and tries one starting
point after the other. `hqqtrain/quant/calibrated/fit.py` explains the algorithm.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqqtrain_kernels.launcher_triton import TRITON_DTYPES, CachedKernel
from hqqtrain_kernels.solve_triton import MAGIC, as_stored, clamp
from hqqtrain_kernels.solver_params import WeightedFitParams

BLOCK_WEIGHTS = 1024
"""Weights of a program, which is one warp: 32 weights for a thread. 64 would spill registers."""

MAX_GROUP_SIZE = 1024
"""Most weights of a group."""


class FitConfig(NamedTuple):
    """The constants of the kernel, as one constexpr.

    Attributes:
        nbits: Bits of a code.
        group_size: Weights of a group.
        padded_size: The power of two at or above it.
        integer_zero: Whether zeros must be codes.
        params: The numbers of the solver.
        meta_min: Smallest scale that is stored.
        meta_max: Largest number of the dtype of scale and zero.
    """

    nbits: int
    group_size: int
    padded_size: int
    integer_zero: bool
    params: WeightedFitParams
    meta_min: float
    meta_max: float


_kernels: dict[tuple[Any, ...], CachedKernel] = {}


def weighted_fit(
    W: Tensor,
    share: Tensor,
    magnitude: Tensor,
    *,
    nbits: int,
    meta_dtype: torch.dtype,
    meta_min: float,
    integer_zero: bool,
    params: WeightedFitParams,
) -> tuple[Tensor, Tensor]:
    """Fit scale and zero of every column of W.

    Args:
        W: Groups as columns, fp32 [group_size, n], normalized.
        share: The share of each weight's squared error, fp32 [group_size, 1]; they add up to 1.
        magnitude: The power of two that each group was divided by, fp32 [n].
        nbits: Bits of a code.
        meta_dtype: Storage dtype of scale and zero.
        meta_min: Smallest scale that is stored.
        integer_zero: Whether zeros must be codes.
        params: The numbers of the solver.

    Returns:
        The normalized scale and the zero as stored, both fp32 [n].
    """
    group_size, count = W.shape
    assert group_size <= MAX_GROUP_SIZE
    assert W.numel() < 1 << 31  # offsets are int32
    config = FitConfig(
        nbits, group_size, triton.next_power_of_2(group_size), integer_zero, params, meta_min,
        torch.finfo(meta_dtype).max,
    )  # fmt: skip
    key, groups = (config, meta_dtype), min(32, BLOCK_WEIGHTS // config.padded_size)
    if key not in _kernels:
        constants = {"META_DTYPE": TRITON_DTYPES[meta_dtype], "FIT": config, "GROUPS": groups}
        _kernels[key] = CachedKernel(
            weighted_fit_kernel, constants, num_warps=1, num_stages=1, enable_fp_fusion=False
        )
    scale, zero = W.new_empty(2, count)
    _kernels[key].launch(
        grid=(triton.cdiv(count, groups), 1, 1),
        tensors={
            "W_ptr": W.contiguous(),
            "share_ptr": share.contiguous(),
            "magnitude_ptr": magnitude.contiguous(),
            "scale_ptr": scale,
            "zero_ptr": zero,
        },
        integers={"count": count},
    )
    return scale, zero


@triton.jit(do_not_specialize=["count"])
def weighted_fit_kernel(
    W_ptr,
    share_ptr,
    magnitude_ptr,
    scale_ptr,
    zero_ptr,
    count,
    META_DTYPE: tl.constexpr,
    FIT: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Fit GROUPS groups. `weighted_fit` explains the arguments.

    A block of weights is [padded_size, GROUPS], and a value per group is [GROUPS]. Padding has no
    share in any sum.
    """
    ABOUT_MIDDLE: tl.constexpr = FIT.params.ranges_about_middle
    ABOUT_MEAN: tl.constexpr = FIT.params.ranges_about_mean
    MAX_CODE: tl.constexpr = 2**FIT.nbits - 1
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    k = tl.arange(0, FIT.padded_size)
    exists, is_weight = group < count, k < FIT.group_size
    offset = k[:, None] * count + group[None, :]
    W = tl.load(W_ptr + offset, is_weight[:, None] & exists[None, :], 0.0)
    share = tl.load(share_ptr + k, is_weight, 0.0)[:, None]
    magnitude = tl.load(magnitude_ptr + group, exists, 1.0)

    low = tl.min(tl.where(is_weight[:, None], W, float("inf")), 0)
    high = tl.max(tl.where(is_weight[:, None], W, float("-inf")), 0)
    value_range = tl.maximum(high - low, 2.0**-30)
    mean = tl.sum(share * W, 0)
    reach = tl.maximum(tl.maximum(low + value_range - mean, mean - low), 2.0**-30) * 2
    middle = low + value_range * 0.5

    best_error = tl.full(low.shape, float("inf"), tl.float32)
    best_scale, best_zero = tl.full(low.shape, 1.0, tl.float32), best_error
    for start in range(len(ABOUT_MIDDLE) + len(ABOUT_MEAN)):
        # 1. Select the starting range and its center.
        width, center = value_range, middle
        for i in tl.static_range(len(ABOUT_MIDDLE)):
            width = tl.where(start == i, value_range * ABOUT_MIDDLE[i], width)
        for i in tl.static_range(len(ABOUT_MEAN)):
            is_this = start == len(ABOUT_MIDDLE) + i
            width = tl.where(is_this, reach * ABOUT_MEAN[i], width)
            center = tl.where(is_this, mean, center)
        scale = width * (1 / MAX_CODE)
        zero = MAX_CODE / 2 - tl.div_rn(center, scale)
        if FIT.integer_zero:
            zero = _round(zero)
            # All levels of a zero outside of the codes have one sign: reach as far as they do.
            farthest = tl.where(zero < 0, MAX_CODE - zero, tl.maximum(zero, MAX_CODE * 1.0))
            scale, zero = scale * (farthest * (1 / MAX_CODE)), clamp(zero, 0.0, MAX_CODE)
        # 2. Round to codes, and regress on the codes.
        for round in range(FIT.params.rounds):
            codes = _encode(W, scale, zero, MAX_CODE)
            if FIT.integer_zero:
                keeps_zero = round == FIT.params.rounds - 1
                scale, zero = _fit_integer(W, codes, scale, zero, mean, share, keeps_zero, MAX_CODE)
            else:
                scale, zero = _fit(W, codes, scale, zero, mean, share, magnitude, META_DTYPE, FIT)
        # 3. Keep the best fit of every group, as it is stored.
        scale, zero = as_stored(
            scale=scale, zero=zero, magnitude=magnitude, META_DTYPE=META_DTYPE, TILE=FIT
        )
        scale = tl.div_rn(scale, magnitude)
        residual = (_encode(W, scale, zero, MAX_CODE) - zero[None, :]) * scale[None, :] - W
        error = tl.sum(share * residual * residual, 0)
        is_better = error < best_error
        best_error = tl.where(is_better, error, best_error)
        best_scale = tl.where(is_better, scale, best_scale)
        best_zero = tl.where(is_better, zero, best_zero)
    tl.store(scale_ptr + group, best_scale, exists)
    tl.store(zero_ptr + group, best_zero, exists)


@triton.jit
def _encode(W, scale, zero, MAX_CODE: tl.constexpr):
    """Return the nearest codes of a block, as fp32."""
    place = W * tl.div_rn(1.0, scale)[None, :] + zero[None, :]
    return (clamp(place, 0.0, MAX_CODE) + MAGIC) - MAGIC


@triton.jit
def _round(x):
    """Return the nearest integers, half to even. A large x has no fraction to round."""
    return tl.where(tl.abs(x) < 4194304.0, (x + MAGIC) - MAGIC, x)


@triton.jit
def _fit(
    W, codes, scale, zero, mean, share, magnitude, META_DTYPE: tl.constexpr, FIT: tl.constexpr
):
    """Regress the weights on their codes; where no line fits, keep scale and zero."""
    mean_code = tl.sum(share * codes, 0)
    centered = codes - mean_code[None, :]
    variance = tl.sum(share * centered * centered, 0)
    covariance = tl.sum(share * centered * (W - mean[None, :]), 0)
    is_valid = (variance > 0) & (covariance > 0)
    fitted = tl.where(is_valid, tl.div_rn(covariance, tl.maximum(variance, 1e-30)), scale)
    # Round the scale to its storage dtype first, so that the zero compensates for the rounding.
    stored, _ = as_stored(
        scale=fitted,
        zero=mean_code - tl.div_rn(mean, fitted),
        magnitude=magnitude,
        META_DTYPE=META_DTYPE,
        TILE=FIT,
    )
    fitted = tl.div_rn(stored, magnitude)
    fitted_zero = mean_code - tl.div_rn(mean, fitted)
    return tl.where(is_valid, fitted, scale), tl.where(is_valid, fitted_zero, zero)


@triton.jit
def _fit_integer(W, codes, scale, zero, mean, share, keeps_zero, MAX_CODE: tl.constexpr):
    """Fit the scale for the given integer zero, and then round the best zero for that scale."""
    distance = codes - zero[None, :]
    products, squares = tl.sum(share * distance * W, 0), tl.sum(share * distance * distance, 0)
    is_valid = (products > 0) & (squares > 0)
    scale = tl.where(is_valid, tl.div_rn(products, tl.maximum(squares, 1e-30)), scale)
    best = clamp(_round(tl.sum(share * codes, 0) - tl.div_rn(mean, scale)), 0.0, MAX_CODE)
    return scale, tl.where(keeps_zero, zero, best)
