"""The kernels of liger-kernel compute what PyTorch computes, and leave their inputs alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hqqtrain.nn import liger

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IGNORED = -100
pytestmark = pytest.mark.skipif(not liger.has_liger(), reason="needs liger-kernel")


def test_cross_entropy():
    torch.manual_seed(0)
    logits, labels = torch.randn(9, 300, device=DEVICE), torch.randint(0, 300, (9,), device=DEVICE)
    labels[::5] = IGNORED
    expected = logits.clone().requires_grad_()
    losses = F.cross_entropy(expected, labels, ignore_index=IGNORED, reduction="none")
    found = liger.cross_entropy_(logits, labels, IGNORED)
    torch.testing.assert_close(found, losses.detach())
    torch.testing.assert_close(logits, torch.autograd.grad(losses.sum(), expected)[0])


def test_cross_entropy_of_no_rows():
    nothing = torch.empty(0, 300, device=DEVICE)
    labels = torch.empty(0, dtype=torch.int64, device=DEVICE)
    assert liger.cross_entropy_(nothing, labels, IGNORED).shape == (0,)


def test_rotation():
    torch.manual_seed(0)
    q, k = torch.randn(2, 6, 4, 16, device=DEVICE), torch.randn(2, 6, 2, 16, device=DEVICE)
    q, k = q.transpose(1, 2).requires_grad_(), k.transpose(1, 2).requires_grad_()
    cos, sin = torch.randn(2, 2, 6, 8, device=DEVICE).repeat(1, 1, 1, 2)
    before = q.detach().clone()

    def rotated(x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat((-right, left), dim=-1) * sin[:, None]

    found, expected = liger.rotate(q, k, cos, sin), (rotated(q), rotated(k))
    assert torch.equal(q, before)
    torch.testing.assert_close(found, expected)
    grads = [torch.randn_like(x) for x in expected]
    theirs = torch.autograd.grad(expected, (q, k), grads)
    ours = torch.autograd.grad(found, (q, k), [grad.clone() for grad in grads])
    torch.testing.assert_close(ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("casting", ["llama", "gemma"])
def test_rms_norm(casting: str):
    torch.manual_seed(0)
    x = torch.randn(5, 64, device="cuda", requires_grad=True)
    weight, grad = torch.rand(64, device="cuda"), torch.randn(5, 64, device="cuda")
    found = liger.rms_norm(x, weight, 1e-6, offset=1.0, casting=casting)
    expected = F.rms_norm(x, (64,), weight + 1, 1e-6)
    torch.testing.assert_close(found, expected)
    (theirs,) = torch.autograd.grad(expected, x, grad)
    before = grad.clone()
    torch.testing.assert_close(torch.autograd.grad(found, x, grad)[0], theirs)
    assert torch.equal(grad, before)
