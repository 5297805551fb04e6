"""The schemas of the `hqqtrain::` operators, their implementations, and their fake versions.

PyTorch calls the implementations by position, in the order of the schema. The last arguments, from
in_features to dtype, are the fields of `WeightParams` in their order. The fake versions compute
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


def packed_weight(W_q: Tensor, scale: Tensor, zero: Tensor, *params: Any) -> PackedWeight:
    """Return the weight of an operator's arguments, whose last are the fields of `WeightParams`."""
    return PackedWeight(W_q, scale, zero, WeightParams(*params))


def _dequantize_into_impl(W_q: Tensor, scale: Tensor, zero: Tensor, *layout_and_out: Any) -> None:
    *layout, out = layout_and_out
    matmul.dequantize_into(packed_weight(W_q, scale, zero, *layout, out.dtype), out)


def _dequantize_impl(W_q: Tensor, scale: Tensor, zero: Tensor, *params: Any) -> Tensor:
    weight = packed_weight(W_q, scale, zero, *params)
    return matmul.dequantize(weight, weight.params.compute_dtype)


def _linear_impl(
    x: Tensor, W_q: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, *params: Any
) -> Tensor:
    return matmul.forward(x, packed_weight(W_q, scale, zero, *params), bias)


def _dequantize_fake(W_q: Tensor, scale: Tensor, zero: Tensor, *params: Any) -> Tensor:
    weight = packed_weight(W_q, scale, zero, *params)
    shape = (_out_features(weight), weight.params.in_features)
    return scale.new_empty(shape, dtype=weight.params.compute_dtype)


def _dequantize_into_fake(*args: Any) -> None:
    pass


def _linear_fake(
    x: Tensor, W_q: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, *params: Any
) -> Tensor:
    weight = packed_weight(W_q, scale, zero, *params)
    return x.new_empty((*x.shape[:-1], _out_features(weight)))


def _out_features(weight: PackedWeight) -> int:
    params = weight.params
    return matmul.out_features(weight.W_q.shape[0], params.group_size, params.axis)


for _name, _impl, _fake in (
    ("dequantize", _dequantize_impl, _dequantize_fake),
    ("dequantize_into", _dequantize_into_impl, _dequantize_into_fake),
    ("linear", _linear_impl, _linear_fake),
):
    LIBRARY.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hqqtrain::{_name}", _fake, lib=LIBRARY)
