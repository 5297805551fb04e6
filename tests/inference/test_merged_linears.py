"""Merged linears compute what the linears computed, once for all of them."""

import pytest
import torch
from exports import TOKENS

from hqqtrain.config.quant import QuantConfig
from hqqtrain.inference.merged_linears import MergedLinear, MergedPart, merge_linears
from hqqtrain.models.fqn import base_model
from hqqtrain.nn.replace import quantize_model
from hqqtrain_kernels import matmul


@pytest.fixture
def products(monkeypatch) -> list[int]:
    """Count the products with a packed weight."""
    counted: list[int] = []
    forward = matmul.forward

    def count(*args, **kwargs):
        counted.append(1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(matmul, "forward", count)
    return counted


@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
def test_the_logits_stay(make_trained, products, nbits):
    """qwen2 has biases; every layer has q, k, v and gate, up, and 2 other linears."""
    trained = make_trained("qwen2", nbits=nbits)
    with torch.no_grad():
        before = trained.model(TOKENS).logits
        assert len(products) == 14
        assert merge_linears(base_model(trained.model)) == 4
        products.clear()
        torch.testing.assert_close(trained.model(TOKENS).logits, before)
        assert len(products) == 8


def test_the_adapter_stays_apart(make_trained):
    trained = make_trained()
    merge_linears(base_model(trained.model))
    with torch.no_grad():
        adapted = trained.model(TOKENS).logits
        with trained.model.disable_adapter():
            assert not torch.allclose(trained.model(TOKENS).logits, adapted, atol=1e-3)
    names = [name for name, _ in trained.model.named_parameters() if "lora_" in name]
    assert len(names) == 28


@pytest.mark.parametrize(
    ("quant", "merged"),
    [({"axis": 0}, 0), ({"overrides": {"*.k_proj": {"nbits": 4}}}, 2),
     ({"overrides": {"*.0.mlp.up_proj": None}}, 3)],
)  # fmt: skip
def test_other_settings_stay_apart(make_trained, quant, merged):
    trained = make_trained(**quant)
    with torch.no_grad():
        before = trained.model(TOKENS).logits
        assert merge_linears(base_model(trained.model)) == merged
        torch.testing.assert_close(trained.model(TOKENS).logits, before)


def test_another_input_has_its_own_product(make_trained):
    """A model may call a linear with something else than its block got."""
    trained = make_trained("qwen2", adapter=None)
    base = base_model(trained.model)
    layer = base.model.layers[0].self_attn.k_proj.base_layer
    x = torch.randn(2, 3, 32)
    before = layer(x)
    merge_linears(base)
    part = base.model.layers[0].self_attn.k_proj.base_layer
    assert isinstance(part, MergedPart)
    torch.testing.assert_close(part(x), before)
    part._merged[0].share(torch.zeros_like(x))
    torch.testing.assert_close(part(x), before)


def test_it_compiles_to_one_graph_with_one_product_for_all(make_model, products):
    model = make_model()
    quantize_model(model, QuantConfig(nbits=4, group_size=16, solver="rtn", calibration=None))
    merge_linears(model)
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        before = model(TOKENS).logits
        compiled(TOKENS)
        products.clear()
        torch.testing.assert_close(compiled(TOKENS).logits, before)
    assert len(products) == 8
    assert all(m.shared is None for m in model.modules() if isinstance(m, MergedLinear))
