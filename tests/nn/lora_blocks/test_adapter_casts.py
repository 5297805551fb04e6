"""Adapters are cast once in the context of a step, and never used after they have changed."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from random_models import random_family
from torch import Tensor, nn

from hqqtrain.nn.lora_blocks import adapter_casts, products
from hqqtrain.training.activation_checkpointing import apply_activation_checkpointing
from hqqtrain.training.fused_lora import FusedLora, fuse_lora

IDS = torch.arange(10)[None]


class Sharded(nn.Parameter):
    """Stands for a DTensor, which needs a process group."""


@pytest.fixture
def casts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of tensors of each cast."""
    found: list[int] = []

    def counted(targets: list[Tensor], sources: list[Tensor]) -> None:
        found.append(len(targets))
        torch._foreach_copy_(targets, sources)

    for module in (adapter_casts, products):
        monkeypatch.setattr(module, "copy_tensors", counted)
    return found


@pytest.fixture
def model() -> Any:
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(random_family("llama"), config).train()
    for name, param in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(param, std=0.1)
    return model


def gradients(model: Any) -> list[Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_one_cast_gives_the_same_bits(model: Any, checkpointed: bool, casts: list[int]) -> None:
    if checkpointed:
        apply_activation_checkpointing(model, offload=False)
    fused: FusedLora = fuse_lora(model)
    expected = gradients(model)
    assert len(casts) >= 2 * 4, "each of four groups in two layers casts its own adapters"
    casts.clear()
    with fused.casts.unchanged():
        for _ in range(2):  # two micro-batches
            assert all(map(torch.equal, gradients(model), expected))
    assert casts == [2 * 7 * 2]


def test_the_next_step_sees_other_values(model: Any) -> None:
    plain = copy.deepcopy(model)
    fused = fuse_lora(model)
    with fused.casts.unchanged():
        gradients(model)
    for each in (model, plain):
        for name, param in each.named_parameters():
            if "lora_" in name:
                param.data.mul_(-2)  # as optimizers do it that autograd does not know of
    fuse_lora(plain)
    with fused.casts.unchanged():
        assert all(map(torch.equal, gradients(model), gradients(plain)))


def test_the_context_ends_with_an_error(model: Any, casts: list[int]) -> None:
    fused = fuse_lora(model)

    def fail() -> None:
        with fused.casts.unchanged():
            gradients(model)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    casts.clear()
    gradients(model)
    assert len(casts) > 1


def test_another_dtype_and_parameters_in_parts_are_cast_by_each_call(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = fuse_lora(model)
    with fused.casts.unchanged():
        assert fused.casts.get(0, torch.bfloat16) is not None
        assert fused.casts.get(0, torch.float16) is None
    linear = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"]
    linear.weight = Sharded(linear.weight.data)
    monkeypatch.setattr(adapter_casts, "DTensor", Sharded)
    down = model.base_model.model.model.layers[1].mlp.down_proj.lora_B["default"]
    down.weight = nn.Parameter(torch.empty(0))
    with fused.casts.unchanged():
        groups = [fused.casts.get(group, torch.bfloat16) for group in range(8)]
    assert [cast is None for cast in groups].count(True) == 2
