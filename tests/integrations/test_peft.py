"""Stock PEFT puts, loads and saves adapters on models that hqqtrain has quantized."""

from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from transformers import AutoModelForCausalLM

import hqqtrain  # noqa: F401  # as users do
from hqqtrain.common.errors import UserError
from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain.nn.lora import HQQLoraLinear

TOKENS = torch.arange(16).view(2, 8)


@pytest.fixture
def base(make_trained, tmp_path: Path):
    """Return a trained model of ours, and the same base as transformers loads it."""
    trained = make_trained("qwen2", nbits=2)
    return trained, AutoModelForCausalLM.from_pretrained(trained.save(tmp_path / "quantized"))


def test_an_adapter_of_ours_on_the_base_that_transformers_loads(base, tmp_path: Path):
    trained, model = base
    trained.model.save_pretrained(tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    assert type(layer) is HQQLoraLinear
    with torch.no_grad():
        assert torch.equal(adapted(TOKENS).logits, trained.model(TOKENS).logits)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    again.load_adapter(str(tmp_path / "adapter"))
    with torch.no_grad():
        assert torch.equal(again.eval()(TOKENS).logits, trained.model(TOKENS).logits)


def test_auto_peft_model_finds_the_base(base, tmp_path: Path):
    trained, _ = base
    trained.model.peft_config["default"].base_model_name_or_path = str(tmp_path / "quantized")
    trained.model.save_pretrained(tmp_path / "adapter")
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(adapted(TOKENS).logits, trained.model(TOKENS).logits)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_a_stock_lora_config_trains(base, tmp_path: Path, targets):
    _, model = base
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    wrapped = [name for name, m in adapted.named_modules() if isinstance(m, HQQLoraLinear)]
    assert len(wrapped) == 2 * (7 if targets == "all-linear" else 2)
    assert not any("lm_head" in name for name in wrapped)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(3):
        loss = adapted(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not any(p.requires_grad for m in adapted.modules() if isinstance(m, HQQLinear)
                   for p in m.parameters(recurse=False))  # fmt: skip
    adapted.save_pretrained(tmp_path / "trained")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    again = PeftModel.from_pretrained(again, tmp_path / "trained").eval()
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, adapted.eval()(TOKENS).logits)


def test_preparing_for_training_keeps_the_packed_weights(base):
    _, model = base
    packed = {n: p.clone() for n, p in model.named_parameters() if "q_proj" in n}
    before = model(TOKENS).logits
    prepared = prepare_model_for_kbit_training(model)
    assert all(torch.equal(prepared.get_parameter(name), packed[name]) for name in packed)
    assert torch.equal(prepared(TOKENS).logits, before)


@pytest.mark.parametrize("init", [True, "gaussian", "eva"])
def test_initial_values_that_need_no_weights(base, init):
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=init, use_dora=True)
    adapted = get_peft_model(base[1], config)
    assert adapted(TOKENS, labels=TOKENS).loss.isfinite()


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_4", "PiSSA", "olora", "corda", "loftq", "orthogonal", "lora_ga"]
)
def test_initial_values_that_need_dense_weights_are_refused(base, init):
    config = LoraConfig(r=2, target_modules=["q_proj"])
    config.init_lora_weights = init
    with pytest.raises(UserError, match=f"init_lora_weights='{init}': .* True, False, None, 'gau"):
        get_peft_model(base[1], config)
