"""A linear layer on the packed weight, for few rows of x: whether a fused kernel runs, and which.

Reading the weight takes most of the time of generation, so the packed weight is read once, and the
dense weight is never written. For up to 16 rows of x and at most 4 bits, codes are multiplied as
integers, which bf16 and fp16 represent exactly, and scale and zero are applied to the fp32 sum of a
group: y = sum_g s_g (q_g . x_g - z_g sum(x_g)). No weight is rounded, but an infinite x makes its
whole row of y NaN. In all other cases weights are rounded to the dtype of x.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from hqqtrain_kernels import heuristics
from hqqtrain_kernels.gemv_triton import gemv
from hqqtrain_kernels.heuristics import GemvConfig, KernelConfig, SkinnyGemmConfig, WideGemmConfig
from hqqtrain_kernels.layout import Layout
from hqqtrain_kernels.skinny_gemm_triton import skinny_gemm
from hqqtrain_kernels.wide_gemm_triton import wide_gemm

KERNELS: dict[type[KernelConfig], Callable[..., Tensor]] = {
    GemvConfig: gemv,
    SkinnyGemmConfig: skinny_gemm,
    WideGemmConfig: wide_gemm,
}
"""The kernel of each configuration.

The first is for one row of x, the second for up to 16 rows, and the third for up to 128 rows and
for all row counts at 8 bits.
"""


def linear(
    x: Tensor, W_q: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, layout: Layout
) -> Tensor | None:
    """Compute x W^T + bias with a fused kernel, if one is faster than dequantizing.

    Args:
        x: [..., in_features], bf16 or fp16.
        W_q: As for `dequantize_triton.dequantize`; so are scale and zero.
        scale: [units, groups].
        zero: [units, groups].
        bias: [out_features], or None.
        layout: How the weight is packed.

    Returns:
        y [..., out_features] in the dtype of x. None if `heuristics` prefers to dequantize, if x
        has another dtype, or if the arguments do not fit together: dequantizing and multiplying
        then raises an error that says what is wrong.
    """
    M = x.numel() // layout.in_features
    if x.dtype not in (torch.bfloat16, torch.float16):
        return None
    config = heuristics.select_kernel(_capability(x.device), layout, M)
    if config is None or not _arguments_match(x, W_q, scale, zero, bias, layout):
        return None
    y = launch(x=x, W_q=W_q, scale=scale, zero=zero, bias=bias, layout=layout, config=config)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], layout.out_features)


def launch(
    x: Tensor,
    W_q: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    layout: Layout,
    config: KernelConfig,
) -> Tensor:
    """Compute y [M, out_features] with the kernel that `config` is for."""
    rows = x if x.dim() == 2 else x.reshape(-1, layout.in_features)
    if rows.stride(1) != 1 or rows.stride(0) >= 1 << 31:
        rows = rows.contiguous()
    kernel = KERNELS[type(config)]
    return kernel(x=rows, W_q=W_q, scale=scale, zero=zero, bias=bias, layout=layout, config=config)


def _arguments_match(
    x: Tensor, W_q: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, layout: Layout
) -> bool:
    """Whether shapes, devices and strides are those that the kernels assume."""
    meta_shape = (layout.units, layout.groups)
    return (
        x.shape[-1] == layout.in_features
        and (bias is None or bias.device == x.device)
        and x.device == W_q.device == scale.device == zero.device
        and W_q.nbytes == layout.units * layout.unit_bytes
        and scale.shape == meta_shape
        and zero.shape == meta_shape
        and W_q.is_contiguous()
        and scale.is_contiguous()
        and zero.is_contiguous()
        and (bias is None or (bias.shape == (layout.out_features,) and bias.is_contiguous()))
    )


def _capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability; the interpreter has that of the GPU the heuristics are for."""
    return _capability_of(device.index) if device.type == "cuda" else (9, 0)


@functools.cache
def _capability_of(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)
