"""transformers loads no altered file, and any class of model from one folder."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
)

from hqqtrain.common.errors import UserError
from hqqtrain.formats.packed import fingerprinted
from hqqtrain.formats.quantized_settings import read_quantized_settings
from hqqtrain.nn.hqq_linear import HQQLinear

TOKENS = torch.arange(16).view(2, 8)
load = AutoModelForCausalLM.from_pretrained


def flip(folder: Path, end: str) -> None:
    """Change one byte of the first tensor whose name has this end."""
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith(end))
    tensors[name].view(-1).view(torch.uint8)[0] ^= 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("end", ["W_q", "norm.weight"])
def test_a_changed_byte_of_a_folder_with_a_manifest(make_trained, tmp_path: Path, end: str):
    folder = make_trained().save(tmp_path / "quantized")
    flip(folder, end)
    with pytest.raises(UserError, match=r"quantized/.*is not what was written.* Copy the folder"):
        load(folder)


@pytest.mark.parametrize("end", ["W_q", "scale", "zero"])
def test_a_changed_byte_of_a_saved_folder(make_trained, tmp_path: Path, end: str):
    load(make_trained().save(tmp_path / "quantized")).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "manifest.json").exists()
    for auto in (AutoModelForCausalLM, AutoModel):
        auto.from_pretrained(tmp_path / "saved")
    flip(tmp_path / "saved", end)
    for auto in (AutoModelForCausalLM, AutoModel):
        with pytest.raises(UserError, match="its packed weights are sha256:"):
            auto.from_pretrained(tmp_path / "saved")


def test_changed_settings_of_a_saved_folder(make_trained, tmp_path: Path):
    folder = make_trained(meta_dtype="bf16").save(tmp_path / "quantized")
    (folder / "manifest.json").unlink()
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"bfloat16"', '"float16"'))
    with pytest.raises(UserError, match="its packed weights are sha256:"):
        load(folder)


def test_layers_on_disk_are_not_compared(make_trained, tmp_path: Path):
    folder = make_trained().save(tmp_path / "quantized")
    (folder / "manifest.json").unlink()
    names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"]
    device_map = dict.fromkeys(names, "cpu") | {"model.layers.1": "disk"}
    model = load(folder, device_map=device_map, offload_folder=tmp_path / "offload")
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, load(folder)(TOKENS).logits)
    model.save_pretrained(tmp_path / "again")
    assert read_quantized_settings(tmp_path / "again") == read_quantized_settings(folder)


@pytest.mark.parametrize("skip", [["lm_head"], []])
def test_a_base_model_and_other_heads(make_trained, tmp_path: Path, skip: list[str]):
    folder = make_trained("qwen2", skip=skip).save(tmp_path / "quantized")
    causal, base = load(folder), AutoModel.from_pretrained(folder)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        expected = causal.model(TOKENS).last_hidden_state
        assert torch.equal(base(TOKENS).last_hidden_state, expected)
        assert torch.equal(classifier.model(TOKENS).last_hidden_state, expected)
    base.save_pretrained(tmp_path / "base")
    for auto in (AutoModel, AutoModelForCausalLM):
        again = auto.from_pretrained(tmp_path / "base")
        with torch.no_grad():
            state = getattr(again, "model", again)(TOKENS).last_hidden_state
        assert torch.equal(state, expected)


def test_settings_are_those_of_the_layers_that_are_saved(make_trained, tmp_path: Path):
    model = load(make_trained().save(tmp_path / "quantized"))
    attention = model.model.layers[0].self_attn
    dense = nn.Linear(attention.q_proj.in_features, attention.q_proj.out_features, bias=False)
    dense.weight.data = attention.q_proj.dequantize()
    attention.q_proj = dense
    before = model(TOKENS).logits
    model.save_pretrained(tmp_path / "mixed")
    again = load(tmp_path / "mixed")
    assert type(again.model.layers[0].self_attn.q_proj) is nn.Linear
    assert torch.equal(again(TOKENS).logits, before)
    assert read_quantized_settings(tmp_path / "mixed") == fingerprinted(again)
    for name, module in list(model.named_modules()):
        if isinstance(module, HQQLinear):
            dense = nn.Linear(module.in_features, module.out_features, bias=False)
            dense.weight.data = module.dequantize()
            model.set_submodule(name, dense)
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    torch.testing.assert_close(load(tmp_path / "dense")(TOKENS).logits, before)


def test_a_dense_model_that_claims_to_be_quantized(make_trained, tmp_path: Path):
    config = AutoConfig.from_pretrained(make_trained().save(tmp_path / "quantized"))
    LlamaForCausalLM(config).save_pretrained(tmp_path / "random")
    with pytest.raises(UserError, match=r"random: has a dense model\.layers"):
        load(tmp_path / "random")
