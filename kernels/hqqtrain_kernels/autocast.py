"""The dtypes in which training computes, under autocast and without."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that the kernels of training compute in."""


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer multiplies x: that of autocast, or that of x."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Return a context in which products on the device of x have the dtype of their operands."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
