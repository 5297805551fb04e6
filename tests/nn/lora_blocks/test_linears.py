"""Linears with the same input are computed once; another input is computed by itself."""

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hqqtrain.nn.lora_blocks import AdapterCasts, SharedInputBlock, linears
from hqqtrain.nn.lora_blocks.adapted_linear import AdaptedLinear, adapted_linear


class Pair(nn.Module):
    """Two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.b(x), self.a(x)


def pair() -> nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(Pair(), LoraConfig(r=2, target_modules=["a", "b"]))
    for name, param in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(param)
    return model.base_model.model


def fused_pair() -> nn.Module:
    model, found = pair(), []
    for module in (model.a, model.b):
        linear = adapted_linear(module)
        assert isinstance(linear, AdaptedLinear)
        found.append(linear)
    SharedInputBlock(found, AdapterCasts())
    return model


def test_one_product_for_one_tensor(monkeypatch) -> None:
    plain, fused, x = pair(), fused_pair(), torch.randn(3, 4)
    seen, compute = [], linears.products.outputs
    monkeypatch.setattr(linears.products, "outputs", lambda *a: seen.append(a) or compute(*a))
    for y, expected in zip(fused(x), plain(x), strict=True):
        torch.testing.assert_close(y, expected)
    assert len(seen) == 1
    torch.testing.assert_close(fused.a(x), plain.a(x))
    torch.testing.assert_close(fused.b(x.clone()), plain.b(x))
    assert len(seen) == 3


def test_the_gradient_of_the_input_is_optional() -> None:
    for requires_grad in (False, True):
        grads = []
        for model in (pair(), fused_pair()):
            x = torch.linspace(-1, 1, 12).view(3, 4).requires_grad_(requires_grad)
            (model.a(x).square().sum() + model.b(x).sum()).backward()
            grads.append([x.grad, *(p.grad for p in model.parameters())])
        for expected, got in zip(*grads, strict=True):
            assert (expected is None) == (got is None)
            if got is not None:
                torch.testing.assert_close(got, expected)


def test_no_rows_and_one_dimension() -> None:
    plain, fused = pair(), fused_pair()
    for shape in ((0, 4), (4,), (2, 3, 4)):
        x = torch.ones(shape)
        torch.testing.assert_close(fused.a(x), plain.a(x))


def test_a_call_without_gradients_is_plain() -> None:
    model, x = fused_pair(), torch.ones(1, 4)
    with torch.no_grad():
        assert torch.equal(model.a(x), pair().a(x))
    with torch.inference_mode():
        assert torch.equal(model.a(x), pair().a(x))
