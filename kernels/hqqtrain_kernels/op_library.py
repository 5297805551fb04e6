"""The schemas of the `hqqtrain::` operators, their implementations, and their fake versions.

PyTorch calls the implementations by position, in the order of the schema. The fake versions compute
the shape and dtype of a result without its data, for torch.compile and FakeTensorMode. `ops.py`
adds the autograd formula of `hqqtrain::linear`, and is what callers use.
"""

from typing import Any

import torch
from torch import Tensor

from hqqtrain_kernels import matmul
from hqqtrain_kernels.matmul import PackedWeight, WeightParams

_WEIGHT = "Tensor W_q, Tensor scale, Tensor zero"
_LAYOUT = "int in_features, int nbits, int group_size, int axis"

LIBRARY = torch.library.Library("hqqtrain", "DEF")
LIBRARY.define(f"dequantize({_WEIGHT}, {_LAYOUT}, ScalarType dtype) -> Tensor")
LIBRARY.define(f"dequantize_into({_WEIGHT}, {_LAYOUT}, Tensor(a!) out) -> ()")
LIBRARY.define(f"linear(Tensor x, {_WEIGHT}, Tensor? bias, {_LAYOUT}, ScalarType dtype) -> Tensor")
dequantize_op = torch.ops.hqqtrain.dequantize.default
dequantize_into_op = torch.ops.hqqtrain.dequantize_into.default
linear_op = torch.ops.hqqtrain.linear.default


def _dequantize_into_impl(
    W_q: Tensor,
    scale: Tensor,
    zero: Tensor,
    in_features: int,
    nbits: int,
    group_size: int,
    axis: int,
    out: Tensor,
) -> None:
    params = WeightParams(in_features, nbits, group_size, axis, compute_dtype=out.dtype)
    matmul.dequantize_into(PackedWeight(W_q, scale, zero, params), out)


def _dequantize_impl(
    W_q: Tensor,
    scale: Tensor,
    zero: Tensor,
    in_features: int,
    nbits: int,
    group_size: int,
    axis: int,
    dtype: torch.dtype,
) -> Tensor:
    params = WeightParams(in_features, nbits, group_size, axis, compute_dtype=dtype)
    return matmul.dequantize(PackedWeight(W_q, scale, zero, params), dtype)


def _linear_impl(
    x: Tensor,
    W_q: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    in_features: int,
    nbits: int,
    group_size: int,
    axis: int,
    dtype: torch.dtype,
) -> Tensor:
    params = WeightParams(in_features, nbits, group_size, axis, compute_dtype=dtype)
    return matmul.forward(x, PackedWeight(W_q, scale, zero, params), bias)


def _dequantize_fake(
    W_q: Tensor,
    scale: Tensor,
    zero: Tensor,
    in_features: int,
    nbits: int,
    group_size: int,
    axis: int,
    dtype: torch.dtype,
) -> Tensor:
    out_features = matmul.out_features(W_q.shape[0], group_size, axis)
    return scale.new_empty((out_features, in_features), dtype=dtype)


def _dequantize_into_fake(*args: Any) -> None:
    pass


def _linear_fake(
    x: Tensor,
    W_q: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    in_features: int,
    nbits: int,
    group_size: int,
    axis: int,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], matmul.out_features(W_q.shape[0], group_size, axis)))


for _name, _impl, _fake in (
    ("dequantize", _dequantize_impl, _dequantize_fake),
    ("dequantize_into", _dequantize_into_impl, _dequantize_into_fake),
    ("linear", _linear_impl, _linear_fake),
):
    LIBRARY.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hqqtrain::{_name}", _fake, lib=LIBRARY)
