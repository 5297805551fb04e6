"""The loss of a frozen head, and its gradient, are those of the plain loss."""

import pytest
import torch
from torch import Tensor, nn

from hqqtrain.data.sequences import IGNORE_INDEX
from hqqtrain.nn import liger
from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain.quant.spec import QuantSpec
from hqqtrain.training.losses import linear_cross_entropy as module
from hqqtrain.training.losses.linear_cross_entropy import LinearCrossEntropy, is_frozen_linear
from hqqtrain.training.losses.next_token import NextTokenLoss

VOCABULARY, HIDDEN = 300, 64
SPEC = QuantSpec(nbits=4, group_size=32, axis=1, solver="rtn", meta_dtype=torch.float32)
needs_liger = pytest.mark.skipif(not liger.has_liger(), reason="needs liger-kernel")


def make_head(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    if kind == "hqq":
        linear = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        return HQQLinear.from_linear(linear, SPEC).to(dtype)
    return nn.Linear(HIDDEN, VOCABULARY, bias=kind == "bias", dtype=dtype).requires_grad_(False)


def make_batch(tokens: int = 37) -> dict[str, Tensor]:
    labels = torch.randint(0, VOCABULARY, (tokens,))
    labels[::5] = IGNORE_INDEX
    return {"labels": labels}


def loss_and_gradient(loss, hidden: Tensor, head: nn.Module, batch: dict) -> tuple[Tensor, Tensor]:
    hidden = hidden.clone().requires_grad_()
    total, count = loss(hidden, head, batch)
    assert total.dtype == torch.float32
    assert int(count) == int((batch["labels"] != IGNORE_INDEX).sum())
    return total.detach(), torch.autograd.grad(total * 0.37, hidden)[0]


@pytest.mark.parametrize("kind", ["plain", "bias", "hqq"])
@pytest.mark.parametrize("rows", [1000, 8])
def test_loss_and_gradient(kind: str, rows: int, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    monkeypatch.setattr(module, "MAX_CHUNK_BYTES", rows * VOCABULARY * 8)
    head, hidden, batch = make_head(kind), torch.randn(37, HIDDEN), make_batch()
    assert is_frozen_linear(head)
    found = loss_and_gradient(LinearCrossEntropy(), hidden, head, batch)
    torch.testing.assert_close(found, loss_and_gradient(NextTokenLoss(), hidden, head, batch))


def test_autocast():
    torch.manual_seed(0)
    head, hidden, batch = make_head("plain", torch.bfloat16), torch.randn(37, HIDDEN), make_batch()
    hidden = hidden.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found, gradient = loss_and_gradient(LinearCrossEntropy(), hidden, head, batch)
        loss, expected = loss_and_gradient(NextTokenLoss(), hidden, head, batch)
    torch.testing.assert_close(found, loss, rtol=1e-3, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=0.02, atol=2e-3)


def test_the_gradient_is_scaled_in_fp32():
    """A factor that is rounded to bf16 would scale all gradients, this one by -0.34 %."""
    torch.manual_seed(0)
    head, hidden = make_head("plain", torch.bfloat16), torch.randn(37, HIDDEN).bfloat16()
    batch, factor = make_batch(), 1 / 8164
    gradients = []
    for scale in (1.0, factor):
        leaf = hidden.clone().requires_grad_()
        (LinearCrossEntropy()(leaf, head, batch)[0] * scale).backward()
        gradients.append(leaf.grad)
    assert torch.equal(gradients[1], (gradients[0].float() * factor).bfloat16())


def test_without_a_label_loss_and_gradient_are_zero():
    batch = {"labels": torch.full((5,), IGNORE_INDEX)}
    head, hidden = make_head("plain"), torch.randn(5, HIDDEN)
    loss, gradient = loss_and_gradient(LinearCrossEntropy(), hidden, head, batch)
    assert float(loss) == 0
    assert not gradient.any()


def test_other_heads_are_not_fused():
    trained, hooked = make_head("plain").requires_grad_(), make_head("plain")
    hooked.register_forward_hook(lambda *_: None)
    assert not any(map(is_frozen_linear, (trained, hooked, nn.Identity(), None)))


@pytest.mark.gpu
@needs_liger
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_without_waiting_for_it(dtype: torch.dtype):
    torch.manual_seed(0)
    head = nn.Linear(256, 32000, bias=False, dtype=dtype).cuda().requires_grad_(False)
    hidden = torch.randn(5000, 256, dtype=dtype, device="cuda").requires_grad_()
    labels = torch.randint(0, 32000, (5000,), device="cuda")
    labels[::7] = IGNORE_INDEX
    loss, _ = NextTokenLoss()(hidden, head, {"labels": labels})
    (expected,) = torch.autograd.grad(loss, hidden)
    LinearCrossEntropy()(hidden, head, {"labels": labels})  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        found, _ = LinearCrossEntropy()(hidden, head, {"labels": labels})
        (gradient,) = torch.autograd.grad(found, hidden)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found, loss, rtol=1e-3, atol=0)
    tolerance = 1e-4 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=tolerance * 0.05)
