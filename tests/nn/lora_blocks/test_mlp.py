"""A gated MLP as one function: see also test_fused_lora.py for its values in whole models."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from hqqtrain.nn.lora_blocks import AdapterCasts, GatedMLPBlock, mlp
from hqqtrain.nn.lora_blocks.adapted_linear import AdaptedLinear, adapted_linear
from hqqtrain.nn.recomputation import checkpoint_contexts


def make_mlp(*, fused: bool, ends_layer: bool = True) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=8, intermediate_size=12, num_attention_heads=2, mlp_bias=True)
    lora = LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj"])
    model = get_peft_model(nn.Sequential(LlamaMLP(config)), lora).base_model.model[0]
    for name, param in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(param)
    if fused:
        linears = []
        for module in (model.gate_proj, model.up_proj, model.down_proj):
            linear = adapted_linear(module)
            assert isinstance(linear, AdaptedLinear)
            linears.append(linear)
        GatedMLPBlock(
            model, *linears, activation="silu", ends_layer=ends_layer, casts=AdapterCasts()
        )
    return model


def gradients(model: nn.Module, *, checkpointed: bool) -> list[Tensor]:
    x = torch.linspace(-2, 2, 48).view(2, 3, 8).requires_grad_()
    if checkpointed:
        y = checkpoint(model, x, use_reentrant=False, context_fn=checkpoint_contexts)
    else:
        y = model(x)
    (x + y).square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("ends_layer", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients(monkeypatch, checkpointed: bool, ends_layer: bool) -> None:
    activations, compute = [], mlp.gated_activation
    monkeypatch.setattr(mlp, "gated_activation", lambda *a: activations.append(a) or compute(*a))
    expected = gradients(make_mlp(fused=False), checkpointed=False)
    model = make_mlp(fused=True, ends_layer=ends_layer)
    for got, value in zip(gradients(model, checkpointed=checkpointed), expected, strict=True):
        torch.testing.assert_close(got, value)
    # Neither `down` nor its input are computed again where nobody needs the output.
    assert len(activations) == (2 if checkpointed and not ends_layer else 1)


def test_an_observed_output_is_computed_again() -> None:
    outputs = []
    model = make_mlp(fused=True)
    model.register_forward_hook(lambda module, x, y: outputs.append(y.detach().clone()))
    gradients(model, checkpointed=True)
    assert all(torch.equal(y, outputs[0]) for y in outputs)
