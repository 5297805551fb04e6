"""The schemas, implementations and fake versions of the operators, by PyTorch's own checks."""

import pytest
import torch
from kernel_weights import packed
from torch._subclasses.fake_tensor import FakeTensorMode

import hqqtrain_kernels as kernels
from hqqtrain_kernels import Layout
from hqqtrain_kernels.matmul import WeightParams
from hqqtrain_kernels.op_library import packed_weight

LAYOUTS = [
    *(Layout(48, 64, nbits, 16, axis) for nbits, axis in ((8, 0), (4, 1), (2, 0), (1, 1))),
    Layout(9, 7, 3, 7, 1), Layout(9, 7, 3, 9, 0),
]  # fmt: skip


def operator_arguments(layout: Layout, dtype: torch.dtype = torch.float32) -> tuple:
    return layout.in_features, layout.nbits, layout.group_size, layout.axis, dtype


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck_of_linear(layout: Layout, with_bias: bool) -> None:
    parts = [part.cpu() for part in packed(layout, torch.float32)]
    x = torch.randn(2, 3, layout.in_features, requires_grad=True)
    bias = torch.randn(layout.out_features, requires_grad=True) if with_bias else None
    arguments = (x, *parts, bias, *operator_arguments(layout))
    torch.library.opcheck(torch.ops.hqqtrain.linear.default, arguments)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_opcheck_of_dequantize(layout: Layout) -> None:
    parts = [part.cpu() for part in packed(layout, torch.float32)]
    arguments = operator_arguments(layout)
    torch.library.opcheck(torch.ops.hqqtrain.dequantize.default, (*parts, *arguments))
    out = torch.empty(layout.out_features, layout.in_features)
    into = torch.ops.hqqtrain.dequantize_into.default
    torch.library.opcheck(into, (*parts, *arguments[:-1], out))


def test_the_last_arguments_of_the_schemas_are_the_fields_of_the_parameters() -> None:
    names = [*WeightParams._fields[:-1], "dtype"]  # the operators call the last one `dtype`
    for op in (torch.ops.hqqtrain.dequantize.default, torch.ops.hqqtrain.linear.default):
        assert [argument.name for argument in op._schema.arguments][-5:] == names
    layout = Layout(48, 64, 4, 16, 0)
    weight = packed_weight(*packed(layout), *operator_arguments(layout, torch.float16))
    assert weight.layout == layout
    assert weight.params.compute_dtype == torch.float16


@pytest.mark.parametrize("axis", [0, 1])
def test_fake_tensors_have_the_shape_and_dtype_of_the_result(axis: int) -> None:
    layout = Layout(32, 64, 4, 16, axis)
    arguments = operator_arguments(layout, torch.bfloat16)
    with FakeTensorMode():
        W_q = torch.empty(layout.units, layout.unit_bytes, dtype=torch.uint8)
        scale, zero = torch.empty(2, layout.units, layout.groups)
        W = torch.ops.hqqtrain.dequantize(W_q, scale, zero, *arguments)
        y = torch.ops.hqqtrain.linear(torch.empty(5, 3, 64), W_q, scale, zero, None, *arguments)
        out = kernels.dequantize(W_q, scale, zero, layout, out=torch.empty(32, 64))
    assert (W.shape, W.dtype) == ((32, 64), torch.bfloat16)
    assert (y.shape, y.dtype) == ((5, 3, 32), torch.float32)
    assert out.shape == (32, 64)
