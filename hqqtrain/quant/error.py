"""The cost and the gain of quantization: the relative error of a weight, and its stored size."""

import torch
from torch import Tensor

from hqqtrain_kernels import Layout

CHUNK_WEIGHTS = 1 << 22
"""Weights that are converted to fp64 at a time, in whole rows."""


def squared_error(W: Tensor, approximation: Tensor) -> Tensor:
    """Return ||W - approximation||^2 and ||W||^2 as fp64 [2].

    Both are sums, so callers can add them up over slices and ranks.
    """
    rows = max(1, CHUNK_WEIGHTS // max(1, W.shape[1]))
    sums = torch.zeros(2, dtype=torch.float64, device=W.device)
    for a, b in zip(W.split(rows), approximation.split(rows), strict=True):
        a = a.double()
        norms = [torch.linalg.vector_norm(x) for x in (b - a, a)]
        sums += torch.stack(norms).square()
    return sums


def relative_error(W: Tensor, approximation: Tensor) -> float:
    """Return ||W - approximation||^2 / ||W||^2; see `error_ratio`."""
    return error_ratio(*squared_error(W, approximation).tolist())


def error_ratio(error: float, norm: float) -> float:
    """Return error / norm of the two sums of `squared_error`: the relative error.

    It is 0 if both sums are 0, as those of an all-zero weight are, which every solver represents
    exactly. It is infinite if only the norm is 0.
    """
    if norm:
        return error / norm
    return float("inf") if error else 0.0


def storage_bits(layout: Layout, meta_dtype: torch.dtype) -> int:
    """Return the bits of one quantized weight: codes with padding, scales and zeros."""
    meta = 2 * layout.groups * meta_dtype.itemsize
    return 8 * layout.units * (layout.unit_bytes + meta)
