"""RMSNorm and its gradient, in plain PyTorch and in Triton, compared with autograd in fp64."""

import pytest
import torch
from kernel_weights import DEVICE
from torch import Tensor

from hqqtrain_kernels.norm_params import NormParams
from hqqtrain_kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_backward

VARIANTS = [NormParams(1e-5), NormParams(1e-6, 0.0, "gemma"), NormParams(1e-6, 1.0, "gemma")]
SHAPES = [(3, 40), (1, 1), (2, 1031), (0, 8), (2, 4096)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("each_backend")


def random_rows(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=DEVICE).mul_(3).to(dtype)


def expected(x: Tensor, weight: Tensor, params: NormParams) -> Tensor:
    rstd = (x.square().mean(-1, keepdim=True) + params.eps).rsqrt()
    return x * rstd * (weight + params.offset)


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    # Up to two roundings; Triton's interpreter truncates to bf16 instead.
    return {"rtol": max(4 * torch.finfo(dtype).eps, 4e-6), "atol": 1e-5}


@pytest.mark.parametrize("params", VARIANTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(dtype: torch.dtype, shape: tuple[int, int], params: NormParams) -> None:
    x, residual = random_rows(shape, dtype), random_rows(shape, dtype)
    weight = random_rows((1, shape[1]), dtype)[0]
    close = tolerance(dtype)
    found = rms_norm(x, weight, params)
    torch.testing.assert_close(
        found.double(), expected(x.double(), weight.double(), params), **close
    )
    total, normed = add_rms_norm(x, residual, weight, params)
    torch.testing.assert_close(total.double(), x.double() + residual.double(), **close)
    assert torch.equal(normed, rms_norm(total, weight, params)), "the sum is rounded first"
    assert (found.dtype, normed.dtype) == (dtype, dtype)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("params", VARIANTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient(
    dtype: torch.dtype, shape: tuple[int, int], params: NormParams, with_residual: bool
) -> None:
    x, grad, other = (random_rows(shape, dtype) for _ in range(3))
    weight = random_rows((1, shape[1]), dtype)[0]
    exact = x.double().requires_grad_()
    normed = expected(exact, weight.double(), params)
    (wanted,) = torch.autograd.grad(normed, exact, grad.double())
    if with_residual:
        wanted += other
    before = other.clone()
    found = rms_norm_backward(grad, x, weight, params, other if with_residual else None)
    eps = torch.finfo(dtype).eps
    limit = 2 * eps * wanted.abs() + 8 * max(eps, 1e-6)  # terms of the sum cancel
    assert (found.double() - wanted).abs().le(limit).all()
    assert torch.equal(other, before)
    assert found.dtype == dtype


def test_a_row_of_zeros_stays_finite() -> None:
    x, weight = torch.zeros(1, 16, device=DEVICE), torch.ones(16, device=DEVICE)
    assert rms_norm(x, weight, VARIANTS[0]).eq(0).all()
    assert rms_norm_backward(weight[None], x, weight, VARIANTS[0]).isfinite().all()
