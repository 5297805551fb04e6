"""Adapters are stock PEFT files, which PEFT reads without a warning."""

import json
import math
import os
import warnings

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from stock_adapters import save_stock_adapter
from transformers import AutoModelForCausalLM

from hqqtrain.common.errors import UserError
from hqqtrain.config.adapter import AdapterConfig
from hqqtrain.formats.adapter_base import BaseModelRef
from hqqtrain.formats.adapter_card import AdapterCard
from hqqtrain.formats.base import ModelExport
from hqqtrain.formats.peft import load_adapter
from hqqtrain.formats.peft import save_adapter as save
from hqqtrain.formats.targets.dense import DenseFormat

TOKENS = torch.arange(24).view(2, 12)


def _card(**more) -> AdapterCard:
    facts = {"base": "owner/name", "fingerprint": "sha256:ab", "nbits": 2, "group_size": 16,
             "axis": 1, "solver": "hqq", "bits_per_weight": 4.0}  # fmt: skip
    return AdapterCard(**facts | more)


def _save(trained, folder, **more):
    card = _card(fingerprint=trained.settings.fingerprint, **more)
    base = BaseModelRef("owner/name", card.revision, card.fingerprint)
    save(trained.adapter.state, trained.adapter.config, folder, base=base, card=card)
    return folder


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_stock_peft_on_the_dequantized_base_gives_the_same_logits(make_trained, tmp_path, kind):
    trained = make_trained("qwen2", adapter=AdapterConfig(kind=kind, r=4, alpha=8, dropout=0.1))
    folder = _save(trained, tmp_path / "adapter")
    export = ModelExport(
        model=trained.model, settings=trained.settings, hf_config=trained.hf_config,
        tokenizer=trained.source, source_dtype=lambda name: None,
    )  # fmt: skip
    DenseFormat().write(export, tmp_path / "dense")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT's own
        stock = PeftModel.from_pretrained(base, folder).eval()
    torch.testing.assert_close(stock(TOKENS).logits, trained.model(TOKENS).logits)
    with stock.disable_adapter():
        assert (stock(TOKENS).logits - trained.model(TOKENS).logits).abs().max() > 0.01


def test_adapters_round_trip(make_trained, tmp_path):
    trained = make_trained()
    folder = _save(trained, tmp_path / "adapter", revision="v1")
    assert set(os.listdir(folder)) == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    found = load_adapter(folder)
    assert found.fingerprint == trained.settings.fingerprint
    assert found.config.revision == "v1"
    assert found.config.base_model_name_or_path == "owner/name"
    assert found.config.inference_mode
    assert found.state.keys() == trained.adapter.state.keys()
    assert all(torch.equal(found.state[k], v) for k, v in trained.adapter.state.items())
    assert found.modules == sorted(trained.settings.modules)


def test_equal_adapters_are_equal_files(make_trained, tmp_path):
    trained = make_trained()
    one, two = _save(trained, tmp_path / "one"), _save(trained, tmp_path / "two")
    for name in ("adapter_config.json", "README.md"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_the_card_names_base_bits_and_fingerprint(make_trained, tmp_path):
    folder = _save(make_trained(), tmp_path / "a", metrics={"perplexity, trained": 9.5})
    text = (folder / "README.md").read_text()
    for part in (
        'base_model: "owner/name"',
        "2-bit",
        "sha256:",
        "groups of 16",
        "9.5",
        "PeftModel",
    ):
        assert part in text


def test_another_base_is_refused(make_trained):
    adapter = make_trained().adapter
    adapter.check_base(adapter.fingerprint, "adapter")
    with pytest.raises(UserError, match=r"runs/a/adapter: trained on the base sha256:"):
        adapter.check_base("sha256:00", "runs/a/adapter")


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 3},
        {"r": 4, "lora_alpha": 3, "use_rslora": True},
        {"r": 4, "lora_alpha": 3, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 7}},
        {"r": 4, "rank_pattern": {"layers.1.mlp.down_proj": 2}},
        {"r": 4, "alpha_pattern": {r"layers\.\d\.mlp.*": 9, "q_proj": 2}, "use_rslora": True},
        {"r": 4, "init_lora_weights": "orthogonal"},
        {"r": 4, "init_lora_weights": "gaussian"},
        {"r": 4, "target_modules": r".*\.(q_proj|down_proj)"},
        {"r": 4, "target_modules": "all-linear", "exclude_modules": r".*(k|v|o|gate|up)_proj"},
    ],
)
def test_deltas_equal_those_of_peft(make_model, tmp_path, config):
    model = save_stock_adapter(tmp_path / "a", make_model(), **config)
    adapter = load_adapter(tmp_path / "a")
    assert adapter.fingerprint is None
    adapter.check_base("sha256:any", "adapter")
    layers = dict(model.base_model.model.named_modules())
    assert len(adapter.modules) == 4
    for name in adapter.modules:
        torch.testing.assert_close(adapter.delta(name), layers[name].get_delta_weight("default"))


def test_scaling(make_trained):
    assert make_trained(adapter=AdapterConfig(r=4, alpha=6)).adapter.scaling("x") == 1.5
    rslora = make_trained(adapter=AdapterConfig(kind="rslora", r=2, alpha=6)).adapter
    assert rslora.scaling("x") == pytest.approx(6 / math.sqrt(2))


def test_an_adapter_of_some_layers_is_read(make_model, tmp_path):
    model = save_stock_adapter(tmp_path / "a", make_model(), r=4, layers_to_transform=[1])
    adapter = load_adapter(tmp_path / "a")
    layers = dict(model.base_model.model.named_modules())
    assert adapter.modules == ["model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj"]
    for name in adapter.modules:
        torch.testing.assert_close(adapter.delta(name), layers[name].get_delta_weight("default"))


def test_damaged_adapters_are_refused(make_trained, tmp_path):
    folder = _save(make_trained(), tmp_path / "a")
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole, values = load_file(weights), json.loads(config.read_text())

    config.write_text(json.dumps(values | {"peft_type": "IA3", "feedforward_modules": []}))
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        load_adapter(folder)
    config.write_text("{")
    with pytest.raises(UserError, match="not a PEFT configuration"):
        load_adapter(folder)
    config.write_text(json.dumps(values))

    save_file(dict(list(whole.items())[1:]), weights)
    with pytest.raises(UserError, match="pair of LoRA matrices"):
        load_adapter(folder)
    save_file(whole, weights)
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match="not a complete safetensors file"):
        load_adapter(folder)
    weights.unlink()
    with pytest.raises(UserError, match=r"contains no adapter_model\.safetensors"):
        load_adapter(folder)
    with pytest.raises(UserError, match=r"contains no adapter_config\.json"):
        load_adapter(tmp_path / "nothing")


def test_our_state_names_are_those_of_peft(make_trained):
    trained = make_trained()
    assert trained.adapter.state.keys() == get_peft_model_state_dict(trained.model).keys()
