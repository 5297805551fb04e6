"""The products of a linear layer, compared with those of the dequantized weight."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hqqtrain_kernels import Layout, matmul, pack, reference
from hqqtrain_kernels.matmul import PackedWeight, WeightParams

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def packed_weight(layout: Layout, compute_dtype: torch.dtype = FP32) -> PackedWeight:
    torch.manual_seed(0)
    codes = torch.randint(0, 1 << layout.nbits, (layout.units, layout.unit_codes)).to(torch.uint8)
    scale, zero = torch.rand(2, layout.units, layout.groups)
    params = WeightParams(
        in_features=layout.in_features,
        nbits=layout.nbits,
        group_size=layout.group_size,
        axis=layout.axis,
        compute_dtype=compute_dtype,
    )
    return PackedWeight(W_q=pack(codes, layout.nbits), scale=scale, zero=zero, params=params)


def dense(weight: PackedWeight, layout: Layout, dtype: torch.dtype) -> Tensor:
    return reference.dequantize(weight.W_q, weight.scale, weight.zero, layout, dtype)


@pytest.mark.parametrize("layout", [Layout(24, 40, 3, 8, 1), Layout(24, 40, 2, 6, 0)], ids=str)
def test_a_weight_knows_its_layout_and_that_of_its_slices(layout: Layout) -> None:
    weight = packed_weight(layout)
    assert weight.layout == layout
    half = PackedWeight(*(t[1:3] for t in weight[:3]), weight.params)
    assert half.layout == layout.slice(1, 3)


@pytest.mark.parametrize("compute_dtype", [FP32, BF16])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP64])
@pytest.mark.parametrize("axis", [0, 1])
def test_products_forward_and_backward(
    axis: int, dtype: torch.dtype, compute_dtype: torch.dtype
) -> None:
    layout = Layout(24, 40, 4, 8, axis)
    weight = packed_weight(layout, compute_dtype)
    # The weight is rounded to the dtype of x at once, unless another compute_dtype comes first.
    W = dense(weight, layout, dtype if compute_dtype == FP32 else compute_dtype).to(dtype)
    x, grad_y, bias = (torch.randn(3, n, dtype=dtype) for n in (40, 24, 24))
    assert torch.equal(matmul.forward(x, weight, bias[0]), F.linear(x, W, bias[0]))
    assert torch.equal(matmul.backward_input(grad_y, weight), grad_y @ W)


def test_autocast_changes_nothing_below_the_operator() -> None:
    layout = Layout(24, 40, 4, 8, 1)
    weight, x = packed_weight(layout), torch.randn(3, 40)
    expected = matmul.forward(x, weight, None)
    with torch.autocast("cpu", BF16):
        assert torch.equal(matmul.forward(x, weight, None), expected)


def test_dequantizes_into_a_part_of_a_buffer() -> None:
    layout = Layout(24, 40, 1, 8, 0)
    weight, buffer = packed_weight(layout), torch.full((26, 44), 7.0, dtype=FP16)
    matmul.dequantize_into(weight, buffer[1:25, 2:42])
    assert torch.equal(buffer[1:25, 2:42], dense(weight, layout, FP16))
    buffer[1:25, 2:42] = 7
    assert bool((buffer == 7).all())  # nothing was written around it


@pytest.mark.parametrize("units", [1, 12])
def test_rows_of_a_weight(units: int) -> None:
    assert matmul.out_features(units, 8, 1) == units
    assert matmul.out_features(units, 8, 0) == 8 * units
