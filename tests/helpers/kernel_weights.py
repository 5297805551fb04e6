"""Packed weights to test kernels with."""

import torch
from torch import Tensor

from hqqtrain_kernels import Layout

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


def packed(layout: Layout, meta_dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    """Return random W_q, scale and zero. All bytes of W_q are random, also those of the padding."""
    packed_shape, meta_shape = (layout.units, layout.unit_bytes), (layout.units, layout.groups)
    W_q = torch.randint(0, 256, packed_shape, dtype=torch.uint8, device=DEVICE)
    scale = torch.rand(meta_shape, device=DEVICE) * 0.1 + 0.01
    zero = torch.rand(meta_shape, device=DEVICE) * (1 << layout.nbits)
    return W_q, scale.to(meta_dtype), zero.to(meta_dtype)
