"""Gated activations and their gradients, in plain PyTorch and in Triton, compared with autograd."""

import pytest
import torch
from kernel_weights import DEVICE
from torch import Tensor
from torch.nn import functional as F

from hqqtrain_kernels.glu import Activation, gated_activation, gated_activation_backward

ACTIVATIONS = ["silu", "gelu_tanh"]
pytestmark = pytest.mark.usefixtures("each_backend")


def expected(gate_up: Tensor, grad_h: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """Return h and the gradient of `gate_up`, computed by autograd in fp64."""
    gate_up = gate_up.double().requires_grad_()
    gate, up = gate_up.chunk(2, dim=1)
    h = (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up
    return h.detach(), torch.autograd.grad(h, gate_up, grad_h.double())[0]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(3, 40), (1, 1), (2, 1031), (0, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients(
    dtype: torch.dtype, shape: tuple[int, int], activation: Activation, in_place: bool
) -> None:
    rows, features = shape
    gate_up = torch.randn(rows, 2 * features, device=DEVICE).mul_(4).to(dtype)
    grad_h = torch.randn(rows, features, device=DEVICE).to(dtype)
    h, grads = expected(gate_up, grad_h, activation)
    # One rounding; Triton's interpreter truncates to bf16 instead.
    eps = max(2 * torch.finfo(dtype).eps, 2e-6)
    close = {"rtol": eps, "atol": 1e-5 if dtype == torch.float32 else 1e-4}
    torch.testing.assert_close(gated_activation(gate_up, activation).double(), h, **close)
    out = gate_up if in_place else torch.empty_like(gate_up)
    gated_activation_backward(grad_h, gate_up, activation, out=out)
    torch.testing.assert_close(grad_h.double(), h, **close)
    torch.testing.assert_close(out.double(), grads, **close)


def test_large_gates_stay_finite() -> None:
    gate_up = torch.tensor([[-200.0, 200.0, 1.0, 1.0]], device=DEVICE)
    grad_h = torch.ones(1, 2, device=DEVICE)
    gated_activation_backward(grad_h, gate_up, "silu", out=gate_up)
    assert grad_h.tolist() == [[0.0, 200.0]]
    assert gate_up.tolist() == [[0.0, 1.0, 0.0, 200.0]]
