"""Weighted fits by the kernel are as close to the weights as those in PyTorch."""

import pytest
import torch
from torch import Tensor

from hqqtrain.quant.calibrated.fit import weighted_least_squares
from hqqtrain.quant.grid import QuantGrid
from hqqtrain_kernels import backend

# The interpreter is NumPy, which warns of divisions whose results the kernel then discards.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = [(4, 64, 40, BF16), (3, 24, 33, FP16), (2, 64, 5, FP32), (1, 16, 32, BF16),
         (8, 128, 9, BF16), (3, 256, 3, FP16), (2, 1, 4, FP32)]  # fmt: skip
"""nbits, group_size, groups, dtype of scale and zero."""


def fit(
    name: str, W: Tensor, importance: Tensor, grid: QuantGrid, integer_zero: bool
) -> tuple[Tensor, Tensor]:
    backend.set_backend(name)
    try:
        return weighted_least_squares(W, importance, grid, integer_zero=integer_zero)
    finally:
        backend.set_backend("auto")


def errors(W: Tensor, importance: Tensor, grid: QuantGrid, found: tuple[Tensor, ...]) -> Tensor:
    scale, zero = (t.double() for t in found)
    codes = (W.double() / scale + zero).round().clamp(0, grid.max_code)
    return (importance * ((codes - zero) * scale - W).square()).sum(0)


@pytest.mark.parametrize("integer_zero", [False, True])
@pytest.mark.parametrize(("nbits", "group_size", "groups", "dtype"), CASES)
def test_the_kernel_fits_as_well_as_torch(
    nbits: int, group_size: int, groups: int, dtype: torch.dtype, integer_zero: bool,
    device: torch.device,
) -> None:  # fmt: skip
    W = torch.randn(group_size, groups, device=device) ** 3
    W[:, ::3] += 2  # far from zero
    grid = QuantGrid(nbits, 2.0 ** torch.randint(-8, 3, (groups,), device=device).float(), dtype)
    importance = torch.rand(group_size, 1, device=device) ** 4 + 1e-3
    ours, expected = (fit(name, W, importance, grid, integer_zero) for name in ("triton", "torch"))
    # Sums in another order may end another round of a group in another place.
    by_kernel, by_torch = (errors(W, importance, grid, found) for found in (ours, expected))
    assert (by_kernel <= by_torch * 1.02 + 1e-9).float().mean() >= 0.9
    assert by_kernel.sum() <= by_torch.sum() * 1.01 + 1e-9
    for found, other in zip(ours, expected, strict=True):
        assert torch.isclose(found, other, rtol=1e-2, atol=1e-2).float().mean() >= 0.7
    assert all(map(torch.equal, ours, grid.as_stored(*ours)))
    if integer_zero:
        assert torch.equal(ours[1], ours[1].round().clamp(0, grid.max_code))


def test_a_group_has_the_same_bits_in_any_slice(device: torch.device) -> None:
    W, importance = torch.randn(64, 70, device=device), torch.rand(64, 1, device=device) + 0.1
    grid = QuantGrid(3, torch.ones(70, device=device), BF16)
    whole = fit("triton", W, importance, grid, False)
    for part in (slice(0, 1), slice(31, 64), slice(40, 70)):
        sliced = QuantGrid(3, torch.ones(part.stop - part.start, device=device), BF16)
        found = fit("triton", W[:, part], importance, sliced, False)
        assert all(torch.equal(mine, t[part]) for mine, t in zip(found, whole, strict=True))


def test_constant_groups_and_groups_far_from_zero_are_finite(device: torch.device) -> None:
    W = torch.cat([torch.zeros(16, 2), torch.ones(16, 2), 1 + torch.rand(16, 4) * 1e-6], 1)
    W, importance = W.to(device), torch.ones(16, 1, device=device)
    for dtype in (BF16, FP16, FP32):
        grid = QuantGrid(4, torch.ones(8, device=device), dtype)
        for integer_zero in (False, True):
            for found in fit("triton", W, importance, grid, integer_zero):
                assert found.isfinite().all()


def test_large_groups_and_importance_by_group_stay_in_torch(device: torch.device) -> None:
    W, grid = torch.randn(1100, 3, device=device), QuantGrid(2, torch.ones(3, device=device), FP32)
    for importance in (torch.rand(1100, 1, device=device), torch.rand(1100, 3, device=device)):
        ours, expected = (fit(n, W, importance, grid, False) for n in ("triton", "torch"))
        assert all(map(torch.equal, ours, expected))
