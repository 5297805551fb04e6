"""Decoder layers that add and norm their residual stream in kernels compute what they computed."""

import copy
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from random_models import random_family
from torch import Tensor, nn

from hqqtrain.models.families.structure import find_decoder_layers
from hqqtrain.training.activation_checkpointing import apply_activation_checkpointing
from hqqtrain.training.fused_layers import fuse_layers
from hqqtrain.training.fused_lora import fuse_lora
from hqqtrain.training.fused_modules import fuse_norms
from hqqtrain_kernels import rms_norm

CPU = torch.device("cpu")
IDS = torch.arange(34).mul(7).remainder(96).view(2, 17)
FUSED = ["llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma"]
OTHERS = ["gemma2", "gemma3_text", "olmo2", "phi3", "gpt_neox"]


def adapted(kind: str, **options: Any) -> Any:
    """Return a small random model with trained adapters."""
    model = random_family(kind, **options)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    peft = get_peft_model(model, config).train()
    for name, param in peft.named_parameters():
        if "lora_" in name:
            nn.init.normal_(param, std=0.2)
    return peft


def fuse(model: Any, *, blocks: bool) -> int:
    """Fuse as training does; return the number of fused decoder layers."""
    base = model.get_base_model()
    if blocks:
        fuse_lora(base)
    return fuse_layers(base, fuse_norms(base, CPU))


def results(model: Any) -> list[Tensor]:
    """Return the logits and the gradients of all adapters."""
    model.zero_grad()
    output = model(input_ids=IDS, labels=IDS, use_cache=False)
    output.loss.backward()
    return [output.logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def check_like(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 2e-5 * theirs.norm() + 1e-7


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return a list that gets every sum that a kernel for norms computes."""
    found: list[Tensor] = []
    add = rms_norm.add_rms_norm

    def recorded(*args: Any) -> tuple[Tensor, Tensor]:
        found.append(args[0])
        return add(*args)

    monkeypatch.setattr(rms_norm, "add_rms_norm", recorded)
    return found


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("kind", FUSED)
def test_families(kind: str, blocks: bool, sums: list[Tensor]) -> None:
    model = adapted(kind)
    expected, names = results(model), list(model.state_dict())
    assert fuse(model, blocks=blocks) == 2
    check_like(results(model), expected)
    assert len(sums) == 2
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("kind", OTHERS)
def test_other_layers_keep_their_code(kind: str) -> None:
    model = adapted(kind)
    assert fuse(model, blocks=False) == 0


def test_a_scaled_residual_is_no_plain_one() -> None:
    assert fuse(adapted("granite", residual_multiplier=0.5), blocks=False) == 0


@pytest.mark.parametrize("blocks", [False, True])
def test_activation_checkpointing(blocks: bool, sums: list[Tensor]) -> None:
    model = adapted("llama")
    expected = results(model)
    apply_activation_checkpointing(model, offload=False)
    assert fuse(model, blocks=blocks) == 2
    check_like(results(model), expected)
    assert len(sums) == 4, "each layer was computed twice"


def test_one_token_in_a_recomputed_layer() -> None:
    model = adapted("llama")
    apply_activation_checkpointing(model, offload=False)
    plain = copy.deepcopy(model)
    fuse(model, blocks=True)
    for each in (plain, model):
        each(input_ids=IDS[:1, :1], use_cache=False).logits.square().sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_a_hook_sees_the_output_of_the_mlp_alone() -> None:
    model = adapted("llama")
    seen: list[Tensor] = []
    layer = find_decoder_layers(model)[0]
    layer.mlp.register_forward_hook(lambda module, inputs, output: seen.append(output))
    expected = results(model)
    fuse(model, blocks=True)
    check_like(results(model), expected)
    torch.testing.assert_close(seen[1], seen[0])


def test_a_hook_of_a_norm_is_called(sums: list[Tensor]) -> None:
    model = adapted("llama")
    fuse(model, blocks=True)
    calls: list[int] = []
    for index, layer in enumerate(find_decoder_layers(model)):
        if index == 0:
            layer.input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    results(model)
    assert calls == [1]
    assert len(sums) == 1, "the other layer uses the kernels"


def test_autocast_with_a_stream_in_fp32() -> None:
    model = adapted("llama")
    exact = results(copy.deepcopy(model).double())
    fused = copy.deepcopy(model)
    assert fuse(fused, blocks=True) == 2
    with torch.autocast("cpu", torch.bfloat16):
        plain, found = results(model), results(fused)
    for ours, theirs, true in zip(found, plain, exact, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - true).norm() <= 1.3 * (theirs - true).norm() + 0.01 * true.norm()


def test_without_gradients_the_code_of_the_model_runs(sums: list[Tensor]) -> None:
    model = adapted("llama").eval()
    tokens = {"input_ids": IDS[:1, :5], "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**tokens)
    fuse(model, blocks=True)
    assert torch.equal(model.generate(**tokens), expected)
    assert not sums


def test_undo() -> None:
    model = adapted("llama")
    layers = find_decoder_layers(model)
    kinds = [type(layer) for layer in layers]
    base = model.get_base_model()
    with ExitStack() as undo:
        fuse_layers(base, fuse_norms(base, CPU, undo), undo)
        assert all(type(layer) is not kind for layer, kind in zip(layers, kinds, strict=True))
        assert [type(layer).__name__ for layer in layers] == [kind.__name__ for kind in kinds]
    assert [type(layer) for layer in layers] == kinds
    assert not any("forward" in vars(module) for module in model.modules())
