"""The products of a linear layer with a packed weight, and the choice of how to compute them.

Few rows of x are multiplied with the packed weight by a fused kernel. Otherwise the weight is
dequantized and multiplied like any dense weight. The dense weight is a new tensor each time:
PyTorch's allocator reuses its memory, per stream and also inside CUDA graphs. A buffer of our own
could not be shared as safely.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hqqtrain_kernels import backend, compat, reference
from hqqtrain_kernels.layout import Layout


class WeightParams(NamedTuple):
    """The numbers that describe a packed weight, in addition to its tensors.

    The number of rows is missing: it follows from W_q. A weight that is dequantized is rounded to
    `compute_dtype` and then multiplied in the dtype of x.
    """

    in_features: int
    nbits: int
    group_size: int
    axis: int
    compute_dtype: torch.dtype


class PackedWeight(NamedTuple):
    """A packed weight [out_features, in_features]: W_q, scale and zero as `dequantize` takes them.

    It is a tuple because autograd treats one that it does not know as a single opaque argument.
    """

    W_q: Tensor
    scale: Tensor
    zero: Tensor
    params: WeightParams

    @property
    def layout(self) -> Layout:
        """The layout of the units that W_q holds."""
        params = self.params
        return _layout(
            units=self.W_q.shape[0],
            in_features=params.in_features,
            nbits=params.nbits,
            group_size=params.group_size,
            axis=params.axis,
        )


@functools.lru_cache(maxsize=4096)
def _layout(units: int, in_features: int, nbits: int, group_size: int, axis: int) -> Layout:
    return Layout(
        out_features=out_features(units, group_size, axis),
        in_features=in_features,
        nbits=nbits,
        group_size=group_size,
        axis=axis,
    )


def out_features(units: int, group_size: int, axis: int) -> int:
    """Return the rows of a weight: one per unit on axis 1, group_size per unit on axis 0."""
    return units * (1 if axis == 1 else group_size)


def forward(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """Compute y = x W^T + bias.

    Args:
        x: [..., in_features].
        weight: W [out_features, in_features].
        bias: [out_features], or None.

    Returns:
        y [..., out_features], in the dtype of x.
    """
    if backend.use_triton(x.device):
        y = triton_kernels().linear(
            x=x,
            W_q=weight.W_q,
            scale=weight.scale,
            zero=weight.zero,
            bias=bias,
            layout=weight.layout,
        )
        if y is not None:
            return y
    if x.is_meta or not compat.is_any_autocast_enabled():
        return F.linear(x, _dequantize_for(x, weight), bias)
    # Autocast is still enabled below the operator and would change the dtype of the result.
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, _dequantize_for(x, weight), bias)


def backward_input(grad_y: Tensor, weight: PackedWeight) -> Tensor:
    """Compute grad_x = grad_y W [..., in_features], in the dtype of grad_y [..., out_features]."""
    return grad_y @ _dequantize_for(grad_y, weight)


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Compute (W_q - zero) * scale [out_features, in_features], rounded once to `dtype`."""
    if not backend.use_triton(weight.W_q.device):
        return reference.dequantize(
            W_q=weight.W_q,
            scale=weight.scale,
            zero=weight.zero,
            layout=weight.layout,
            dtype=dtype,
        )
    if dtype.itemsize > 4:  # the kernel writes at most fp32
        return dequantize(weight, torch.float32).to(dtype)
    layout = weight.layout
    out = weight.scale.new_empty((layout.out_features, layout.in_features), dtype=dtype)
    dequantize_into(weight, out)
    return out


def dequantize_into(weight: PackedWeight, out: Tensor) -> None:
    """Write (W_q - zero) * scale to `out` [out_features, in_features]."""
    if backend.use_triton(weight.W_q.device):
        triton_kernels().dequantize(
            W_q=weight.W_q,
            scale=weight.scale,
            zero=weight.zero,
            layout=weight.layout,
            out=out,
        )
    else:
        reference.dequantize(
            W_q=weight.W_q,
            scale=weight.scale,
            zero=weight.zero,
            layout=weight.layout,
            dtype=out.dtype,
            out=out,
        )


class TritonKernels(NamedTuple):
    """The kernels that this module launches."""

    dequantize: Callable[..., None]
    linear: Callable[..., Tensor | None]


@functools.cache
def triton_kernels() -> TritonKernels:
    """Import the kernels when a GPU first needs them: Triton does not exist for macOS."""
    from hqqtrain_kernels import dequantize_triton, linear_triton

    return TritonKernels(dequantize=dequantize_triton.dequantize, linear=linear_triton.linear)


def rounding_dtype(dtype: torch.dtype, compute_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that a weight is rounded to before it is cast to `dtype`.

    This is the layer's `compute_dtype`, unless that is fp32: dequantizing computes in fp32 anyway,
    and the weight is rounded to `dtype` directly.
    """
    return dtype if compute_dtype == torch.float32 else compute_dtype


def _dequantize_for(x: Tensor, weight: PackedWeight) -> Tensor:
    """Return the dense weight in the dtype of x."""
    W = dequantize(weight, rounding_dtype(x.dtype, weight.params.compute_dtype))
    return W if W.dtype == x.dtype else W.to(x.dtype)
