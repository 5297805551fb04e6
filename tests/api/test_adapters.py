"""`add_lora` resolves targets as a run does, and its adapters record their base."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open

import hqqtrain
from hqqtrain.common.errors import UserError
from hqqtrain.formats.peft import load_adapter


def recorded(folder: Path) -> str | None:
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        return (file.metadata() or {}).get("hqqtrain_base_fingerprint")


def test_settings_per_layer(quantized, tmp_path: Path):
    model = hqqtrain.add_lora(
        quantized, r=4, alpha=8, target_modules=["q_proj", "self_attn.v_proj", "*.1.mlp.*"],
        rank_pattern={"self_attn.q_proj": 2, "model.layers.1.self_attn.q_proj": 3},
        alpha_pattern={"v_proj": 2.0},
    )  # fmt: skip
    layers = model.base_model.model.model.layers
    q, v = (layers[1].self_attn.q_proj, layers[1].self_attn.v_proj)
    assert (layers[0].self_attn.q_proj.r["default"], q.r["default"], v.r["default"]) == (2, 3, 4)
    assert v.scaling["default"] == 0.5
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path)
    assert len(adapter.modules) == 7
    assert adapter.scaling("model.layers.0.self_attn.q_proj") == 4.0


def test_the_seed_decides_the_initial_values(quantized):
    first = hqqtrain.add_lora(quantized, r=2, seed=1)
    values = [p.clone() for p in first.parameters() if p.requires_grad]
    second = hqqtrain.add_lora(first.unload(), r=2, seed=1)
    again = [p for p in second.parameters() if p.requires_grad]
    assert all(torch.equal(*pair) for pair in zip(values, again, strict=True))


@pytest.mark.parametrize("stock", [False, True])
def test_a_new_adapter_records_its_base(quantized, tmp_path: Path, stock: bool):
    model = (
        get_peft_model(quantized, LoraConfig(target_modules="all-linear")) if stock
        else hqqtrain.add_lora(quantized)
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    assert recorded(tmp_path) == quantized.config.quantization_config.description["fingerprint"]


def test_a_new_adapter_of_a_dense_model_records_nothing(dense, tmp_path: Path):
    get_peft_model(dense, LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path)
    assert recorded(tmp_path) is None


@pytest.mark.parametrize(("arguments", "message"), [
    ({"r": 0}, "r=0: must be at least 1"),
    ({"kind": "none"}, "kind=none: adds nothing"),
    ({"target_modules": "nowhere"}, "target_modules=nowhere: matches no linear layer"),
    ({"rank_pattern": {"lm_head": 2}}, "rank_pattern=lm_head: matches no target"),
    ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\[q_proj\]=0: must be an integer, at least 1"),
    ({"rank_pattern": {"q_proj": 2.5}}, r"rank_pattern\[q_proj\]=2.5: must be an integer"),
    ({"rank_pattern": [2]}, r"rank_pattern=\[2\]: must map patterns to values"),
    ({"alpha_pattern": {"q_proj": float("nan")}}, r"alpha_pattern\[q_proj\]=nan: must be a number"),
    ({"target_modules": 5}, "target_modules=5: must be a list of names|.*target_modules="),
    ({"dropout": 1}, "dropout=1.0: must be below 1"),
    ({"seed": -1}, "seed=-1: must be at least 0"),
])  # fmt: skip
def test_values_that_are_not_allowed(quantized, arguments: dict, message: str):
    with pytest.raises(UserError, match=f"^add_lora: {message}"):
        hqqtrain.add_lora(quantized, **arguments)


def test_models_that_are_not_allowed(dense):
    with pytest.raises(UserError, match="no quantized layer"):
        hqqtrain.add_lora(dense)
    hqqtrain.quantize_model(dense, nbits=2, group_size=32, solver="rtn")
    hqqtrain.add_lora(dense)
    with pytest.raises(UserError, match="has an adapter already"):
        hqqtrain.add_lora(dense)
