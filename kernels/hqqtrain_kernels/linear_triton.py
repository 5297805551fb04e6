"""A linear layer on the packed weight, for few rows of x: which kernel, and whether one at all.

Generation is bound by reading the weight, so it is read packed, once, and never written. For up to
16 rows of x, at 4 bits and less, codes are multiplied as integers, exact in bf16 and fp16, and
scale and zero meet the fp32 sum of a group: y = sum_g s_g (q_g . x_g - z_g sum(x_g)). No weight is
rounded; an infinite x makes its whole row NaN. Otherwise weights are rounded, to the dtype of x.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from hqqtrain_kernels import skinny_triton, table, vector_triton, wide_triton
from hqqtrain_kernels.layout import Layout

KERNELS: dict[type, Callable[..., Tensor]] = {
    table.Vector: vector_triton.launch,
    table.Skinny: skinny_triton.launch,
    table.Wide: wide_triton.launch,
}
"""One row of x; up to 16; up to 128, and all at 8 bits."""


def linear(
    x: Tensor, W_q: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, layout: Layout
) -> Tensor | None:
    """x [..., in_features] times the dequantized weight transposed, plus bias, in the dtype of x.

    W_q, scale, zero: as for `dequantize_triton`. None where `table` would rather dequantize, for an
    x of another dtype than bf16 and fp16, and for what does not fit together, which dequantizing
    and multiplying refuse with words.
    """
    M = x.numel() // layout.in_features
    known = x.dtype in (torch.bfloat16, torch.float16)
    settings = table.choose(_capability(x.device), layout, M) if known else None
    if settings is None or not _fit(x, W_q, scale, zero, bias, layout):
        return None
    y = launch(x, W_q, scale, zero, bias, layout, settings)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], layout.out_features)


def launch(
    x: Tensor, W_q: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, layout: Layout,
    settings: table.Settings,
) -> Tensor:  # fmt: skip
    """`linear` as `settings` say: [M, out_features]."""
    rows = x if x.dim() == 2 else x.reshape(-1, layout.in_features)
    if rows.stride(1) != 1 or rows.stride(0) >= 1 << 31:
        rows = rows.contiguous()
    return KERNELS[type(settings)](rows, W_q, scale, zero, bias, layout, settings)


def _fit(
    x: Tensor, W_q: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, layout: Layout
) -> bool:
    meta_shape = (layout.units, layout.groups)
    return (
        x.shape[-1] == layout.in_features
        and (bias is None or bias.device == x.device)
        and x.device == W_q.device == scale.device == zero.device
        and W_q.nbytes == layout.units * layout.row_bytes
        and scale.shape == meta_shape
        and zero.shape == meta_shape
        and W_q.is_contiguous() and scale.is_contiguous() and zero.is_contiguous()
        and (bias is None or (bias.shape == (layout.out_features,) and bias.is_contiguous()))
    )  # fmt: skip


def _capability(device: torch.device) -> tuple[int, int]:
    """Of the interpreter too: that of the GPU that `table` was measured on."""
    return _capability_of(device.index) if device.type == "cuda" else (9, 0)


@functools.cache
def _capability_of(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)
