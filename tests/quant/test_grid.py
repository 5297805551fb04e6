"""The grid of codes, storage of scale and zero, and sums in fixed point."""

import math

import pytest
import torch

from hqqtrain.quant.grid import FixedPoint, QuantGrid, group_ranges, power_of_two


def test_power_of_two_is_the_one_at_or_below() -> None:
    x = torch.cat([torch.rand(100) * 10.0**e for e in range(-30, 31, 5)] + [2.0 ** torch.arange(9)])
    expected = [2.0 ** (math.frexp(value)[1] - 1) for value in x.tolist()]
    assert power_of_two(x).tolist() == expected
    extremes = torch.tensor([0.0, 1e-45, 3e38])
    assert power_of_two(extremes).tolist() == [2.0**-126, 2.0**-126, 2.0**126]


def test_ranges_are_never_zero() -> None:
    W = torch.tensor([[1.0, 0.5], [3.0, 0.5]])
    low, value_range = group_ranges(W)
    assert low.tolist() == [1, 0.5]
    assert value_range.tolist() == [2, 2.0**-30]


@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
def test_codes_are_the_nearest_of_all(nbits: int) -> None:
    W, scale, zero = torch.randn(33, 5), torch.rand(5) / 2**nbits + 0.01, torch.rand(5) * 2**nbits
    grid = QuantGrid(nbits, torch.ones(5), torch.float32)
    levels = (torch.arange(2.0**nbits)[:, None].double() - zero) * scale  # [codes, n]
    distances = (W.double() - levels[:, None]).abs()
    chosen = grid.encode(W, scale, zero)
    assert grid.max_code == 2**nbits - 1
    assert torch.equal(chosen, distances.argmin(0).float())
    expected = distances.amin(0).square().sum(0)
    torch.testing.assert_close(grid.error(W, scale, zero), expected, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("meta_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_storage_rounds_scale_and_zero_once(meta_dtype: torch.dtype) -> None:
    magnitude = torch.tensor([1.0, 2.0**-20, 8.0])
    grid = QuantGrid(4, magnitude, meta_dtype)
    scale, zero = torch.rand(3) + 0.1, torch.randn(3) * 10
    stored_scale, stored_zero = grid.to_meta_dtype(scale, zero)
    assert stored_scale.dtype == stored_zero.dtype == meta_dtype
    assert torch.equal(stored_scale, (scale * magnitude).to(meta_dtype))
    assert torch.equal(stored_zero, zero.to(meta_dtype))
    normalized_scale, fp32_zero = grid.as_stored(scale, zero)
    assert torch.equal(normalized_scale * magnitude, stored_scale.float())
    assert torch.equal(fp32_zero, stored_zero.float())


def test_a_zero_too_large_for_fp16_widens_the_scale() -> None:
    """Code 0 keeps its distance from weight 0; otherwise all weights would move."""
    grid = QuantGrid(4, torch.ones(1), torch.float16)
    scale, zero = torch.tensor([1e-3]), torch.tensor([-1e6])
    stored_scale, stored_zero = grid.to_meta_dtype(scale, zero)
    assert stored_zero.item() == -torch.finfo(torch.float16).max
    product = stored_scale.double() * stored_zero.double()
    assert product.item() == pytest.approx(-1e3, rel=1e-3)


@pytest.mark.parametrize("meta_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_scale_becomes_zero_or_infinite(meta_dtype: torch.dtype) -> None:
    magnitude = torch.tensor([2.0**-126, 2.0**126])
    scale, _ = QuantGrid(1, magnitude, meta_dtype).to_meta_dtype(torch.ones(2), torch.zeros(2))
    assert scale.isfinite().all()
    assert (scale > 0).all()


@pytest.mark.parametrize("bits", [13, 20])
def test_fixed_point_is_within_half_a_step_and_sums_exactly(bits: int) -> None:
    W = torch.randn(100, 7)
    fixed = FixedPoint.from_float(W, bits)
    assert torch.equal(fixed.x, fixed.x.round())
    assert fixed.x.amin() >= 0
    assert fixed.x.amax() <= 2 ** (bits + 1)
    back = fixed.low.double() + fixed.x * fixed.step
    # Half a step, and the rounding of W - low to fp32.
    assert (back - W).abs().amax() <= 0.5001 * fixed.step.amax() + 2.0**-22
    shuffled = FixedPoint.from_float(W[torch.randperm(100)], bits)
    assert torch.equal(fixed.mean(), shuffled.mean())
    torch.testing.assert_close(fixed.mean(), W.mean(0), rtol=0, atol=fixed.step.amax().item())
