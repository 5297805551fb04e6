"""Adapters that the installed hqq has saved."""

from pathlib import Path

import pytest
import torch
from small_model import small_model
from torch import nn
from transformers import AutoModelForCausalLM

import hqqtrain
from hqqtrain.common.errors import UserError

hqq_hf = pytest.importorskip("hqq.models.hf.base", reason="hqq is not installed here")
from hqq.core.peft import PeftUtils  # noqa: E402
from hqq.core.quantize import BaseQuantizeConfig  # noqa: E402
from hqq.models.hf.llama import LlamaHQQ  # noqa: E402

Q = "model.layers.0.self_attn.q_proj"
TOKENS = torch.arange(16).view(2, 8)
LORA = {"r": 4, "lora_alpha": 8, "dropout": 0.0, "train_dtype": torch.float32}


def trained_by_hqq(file: Path, **settings: dict | None) -> nn.Module:
    """Return a model of hqq with an adapter, whose file is saved."""
    model = AutoModelForCausalLM.from_pretrained(small_model(), dtype=torch.float32)
    config = BaseQuantizeConfig(nbits=8, group_size=32, axis=1)
    hqq_hf.AutoHQQHFModel.quantize_model(model, config, compute_dtype=torch.float32, device="cpu")
    tags = model.linear_tags
    per_tag = {tag.replace("__", "."): value for tag, value in settings.items()}
    PeftUtils.add_lora(model, dict.fromkeys(tags) | per_tag, verbose=False)
    for name, param in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(param, std=0.05)
    # With AutoHQQHFModel, hqq 0.2.8 finds no layer of an adapter and writes an empty file.
    PeftUtils.save_lora_weights(model, str(file), base_class=LlamaHQQ, verbose=False)
    return model.eval()


def ours() -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(small_model(), dtype=torch.float32)
    hqqtrain.quantize_model(model, nbits=8, group_size=32, solver="hqq")
    return model


def test_ranks_and_scalings_per_tag(tmp_path: Path):
    more = {**LORA, "r": 2, "lora_alpha": 6}
    theirs = trained_by_hqq(tmp_path / "lora.pt", self_attn__q_proj=LORA, mlp__up_proj=more)
    model = hqqtrain.load_hqq_lora(ours(), tmp_path / "lora.pt")
    up = model.base_model.model.model.layers[1].mlp.up_proj
    assert (up.r["default"], up.scaling["default"]) == (2, 3.0)
    with torch.no_grad():
        expected, base = theirs(TOKENS).logits, ours()(TOKENS).logits
        found = model(TOKENS).logits
    assert (found - expected).abs().max() < 0.05 * (base - expected).abs().max()
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(("module", "change", "message"), [
    ("nowhere", {}, "nowhere: is no quantized layer"),
    (Q, {"scaling": None}, "has lora_A, lora_B, and no LoRA"),
    (Q, {"lora_A": torch.zeros(2, 128)}, r"has lora_A \[2, 128\]"),
    (Q, {"bias": torch.ones(128)}, "has a trained bias"),
])  # fmt: skip
def test_what_does_not_fit(quantized, monkeypatch, module: str, change: dict, message: str):
    state = {"lora_A": torch.zeros(128, 2), "lora_B": torch.zeros(2, 128),
             "scaling": torch.tensor(2.0)} | change  # fmt: skip
    states = {module: {name: tensor for name, tensor in state.items() if tensor is not None}}
    monkeypatch.setattr("hqqtrain.api.hqq_lora._read", lambda _: states)
    with pytest.raises(UserError, match=f"^load_hqq_lora: .*{message}"):
        hqqtrain.load_hqq_lora(quantized, "lora.pt")


def test_files_that_are_refused(quantized, tmp_path: Path):
    file = tmp_path / "lora.pt"
    with pytest.raises(UserError, match=r"load_hqq_lora: file=.*: no such file"):
        hqqtrain.load_hqq_lora(quantized, file)
    torch.save({"peft_config": print, "parameters": {}}, file)
    with pytest.raises(UserError, match=r"cannot be read as an adapter .*print, which is code"):
        hqqtrain.load_hqq_lora(quantized, file)
