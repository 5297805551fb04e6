"""Columns quantized by the kernel: the codes, errors and later columns of a loop in PyTorch."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from hqqtrain.quant.calibrated.columns import quantize_columns
from hqqtrain_kernels import backend

SHAPES = [(64, 64, 64, 1, 40), (64, 32, 32, 1, 33), (48, 24, 24, 1, 5), (64, 64, 1, 8, 6),
          (10, 10, 1, 3, 50), (1, 1, 8, 1, 1), (64, 64, 128, 1, 40)]  # fmt: skip
"""Columns, quantized columns, columns of a group, rows of a unit, units."""


@dataclass
class Columns:
    W: Tensor
    scale: Tensor
    zero: Tensor
    feedback: Tensor
    codes: Tensor
    errors: Tensor


def example(shape: tuple[int, ...], nbits: int, meta_dtype: torch.dtype) -> Columns:
    columns, count, group_columns, unit_rows, units = shape
    groups = -(-count // group_columns)
    return Columns(
        torch.randn(columns, unit_rows, units),
        (torch.rand(groups, units) + 0.5).mul_(4 / 2**nbits).to(meta_dtype),
        (torch.rand(groups, units) * (2**nbits - 1)).to(meta_dtype),
        (torch.randn(count, columns) * 0.1).triu_(1),
        torch.full((count, unit_rows, units), 255, dtype=torch.uint8),
        torch.full((count, unit_rows, units), torch.nan),
    )


def run(name: str, on: Columns, nbits: int, group_columns: int, device: torch.device) -> Columns:
    backend.set_backend(name)
    try:
        mine = Columns(*(t.clone().to(device) for t in vars(on).values()))
        quantize_columns(*vars(mine).values(), nbits=nbits, group_columns=group_columns)
        return Columns(*(t.cpu() for t in vars(mine).values()))
    finally:
        backend.set_backend("auto")


@pytest.mark.parametrize(
    ("nbits", "meta_dtype"), [(4, torch.bfloat16), (1, torch.float16), (8, torch.float32)]
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_computes_what_torch_does(
    shape: tuple[int, ...], nbits: int, meta_dtype: torch.dtype, device: torch.device
) -> None:
    columns, count, group_columns, *_ = shape
    on = example(shape, nbits, meta_dtype)
    ours, expected = (run(name, on, nbits, group_columns, device) for name in ("triton", "torch"))
    # A weight midway between two codes may be rounded the other way, and change those behind it.
    same = (ours.codes == expected.codes).all(0)
    assert same.float().mean() > 0.95
    torch.testing.assert_close(ours.errors[:, same], expected.errors[:, same], atol=1e-5, rtol=1e-4)
    later, expected_later = ours.W[count:], expected.W[count:]
    torch.testing.assert_close(later[:, same], expected_later[:, same], atol=1e-5, rtol=1e-4)
    assert int(ours.codes.max()) < 2**nbits
    assert columns == count or not torch.equal(later, on.W[count:])


def test_midway_between_two_codes_the_even_one_is_taken(device: torch.device) -> None:
    W = torch.tensor([0.5, 1.5, 2.5, -7.0, 99.0]).view(1, 1, 5)
    one, none = torch.ones(1, 5), torch.zeros(1, 5)
    on = Columns(W, one, none, torch.zeros(1, 1), torch.empty_like(W, dtype=torch.uint8), W.clone())
    for name in ("triton", "torch"):
        found = run(name, on, 2, 1, device)
        assert found.codes.flatten().tolist() == [0, 2, 2, 0, 3]
        assert found.errors.flatten().tolist() == [0.5, -0.5, 0.5, -7.0, 96.0]
