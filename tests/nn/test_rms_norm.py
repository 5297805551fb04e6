"""RMSNorm as an autograd function: its gradients, and those of the residual stream."""

import pytest
import torch
from torch import Tensor

from hqqtrain.nn.rms_norm import is_computable, residual_and_norm, rms_norm
from hqqtrain_kernels.norm_params import NormParams

PARAMS = NormParams(1e-6)


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + PARAMS.eps) * weight


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float32)


@pytest.mark.parametrize("uses", [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0)], ids=str)
@pytest.mark.parametrize("has_output", [False, True])
def test_gradients(has_output: bool, uses: tuple[float, float]) -> None:
    weight, grads = random(8), [random(2, 5, 8) for _ in range(2)]
    inputs = [random(2, 5, 8).requires_grad_() for _ in range(1 + has_output)]
    total = sum(inputs[1:], start=inputs[0])
    wanted = (total, plain_norm(total, weight))
    found = residual_and_norm(inputs[0], inputs[1] if has_output else None, weight, PARAMS)
    torch.testing.assert_close(found, wanted)

    def gradients(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        parts = zip(outputs, grads, uses, strict=True)
        loss = sum((output * grad).sum() for output, grad, use in parts if use)
        return torch.autograd.grad(loss, inputs)

    torch.testing.assert_close(gradients(found), gradients(wanted), rtol=1e-5, atol=1e-6)


def test_a_transposed_input() -> None:
    weight, x = random(6), random(6, 3).t().requires_grad_()
    torch.testing.assert_close(rms_norm(x, weight, PARAMS), plain_norm(x, weight))
    torch.autograd.gradcheck(
        lambda x: rms_norm(x, weight, PARAMS), x, eps=1e-2, atol=1e-2, rtol=1e-2
    )


def test_the_residual_is_not_copied_and_not_changed() -> None:
    x = random(2, 4).requires_grad_()
    before = x.detach().clone()
    stream, _ = residual_and_norm(x, None, random(4), PARAMS)
    assert stream.data_ptr() == x.data_ptr()
    assert torch.equal(x, before)


def test_what_is_not_computable() -> None:
    weight = random(4)
    assert is_computable(random(2, 4), weight)
    assert not is_computable(random(2, 4).bfloat16(), weight)
    assert not is_computable(random(2, 4).double(), weight.double())
    assert not is_computable(torch.empty(1, 1 << 15), torch.empty(1 << 15))
