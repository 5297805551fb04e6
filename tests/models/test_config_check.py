"""A config.json that cannot be right is refused in a moment, before a model is built from it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from random_models import SIZES
from transformers import CONFIG_MAPPING

from hqqtrain.common.errors import UserError
from hqqtrain.common.reading import MAX_JSON_BYTES
from hqqtrain.config.model import ModelConfig
from hqqtrain.models import config_check
from hqqtrain.models.build import build_meta, load_hf_config
from hqqtrain.models.config_check import check_config_json
from hqqtrain.models.source import read_config_json, resolve_source

LLAMA: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]} | SIZES


def write(folder: Path, text: str) -> Path:
    (folder / "config.json").write_text(text)
    return folder


def build(folder: Path, **changes: Any) -> None:
    """Build the model of a Llama's config.json with `changes`."""
    build_meta(load_hf_config(write(folder, json.dumps(LLAMA | changes))))


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 1e12},
        {"hidden_size": 10**12},
        {"hidden_size": -32},
        {"hidden_size": "large"},
        {"hidden_size": None},
        {"hidden_size": [32]},
        {"hidden_size": 0.5},
        {"vocab_size": -1},
        {"vocab_size": 10**15},
        {"num_hidden_layers": 10**8},
        {"num_hidden_layers": 10**30},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 0},
        {"num_attention_heads": 0},
        {"num_attention_heads": 10**9},
        {"num_key_value_heads": -2},
        {"num_labels": 10**9},
        {"num_labels": 10**6},
        {"head_dim": -8},
        {"intermediate_size": float("inf")},
        {"max_position_embeddings": 10**12},
        {"rms_norm_eps": -1.0},
        {"rms_norm_eps": float("nan")},
        {"attention_dropout": 5},
        {"attention_dropout": -0.1},
        {"attention_dropout": float("nan")},
        {"hidden_dropout_prob": 2},
        {"resid_pdrop": -1},
        {"unknown_key": float("nan")},
        {"rope_parameters": {"rope_type": "linear", "factor": 0, "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "linear", "factor": float("nan"), "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}},
        {"rope_parameters": {"rope_type": "unknown"}},
        {"rope_parameters": "default"},
        {"hidden_act": "unknown"},
        {"hidden_act": 3},
        {"hidden_act": "__import__('os').system('true')"},
        {"dtype": "complex999"},
        {"dtype": 7},
        {"attn_implementation": "kernels-community/flash-attn"},
        {"attn_implementation": "someone/kernel:function"},
        {"attn_implementation": "flash_attention_2"},
        {"attn_implementation": "unknown"},
        {"attn_implementation": {"": "kernels-community/flash-attn"}},
        {"_attn_implementation": "kernels-community/flash-attn"},
        {"experts_implementation": "sonicmoe"},
        {"model_type": "no_such_model"},
        {"model_type": 5},
        {"model_type": ["llama"]},
        {"model_type": "t5"},
        {"tie_word_embeddings": "perhaps"},
        {"pad_token_id": 10**9},
    ],
    ids=lambda changes: str(changes)[1:50],
)
def test_a_value_that_no_model_has(tmp_path, changes):
    with pytest.raises(UserError, match=r"config\.json|model_type") as caught:
        build(tmp_path, **changes)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("key", ["output_attentions", "output_hidden_states", "return_dict"])
def test_what_a_call_returns_does_not_depend_on_config_json(tmp_path, key):
    write(tmp_path, json.dumps(LLAMA | {key: key != "return_dict"}))
    config = load_hf_config(tmp_path)
    assert (config.return_dict, config.output_hidden_states) == (True, False)
    assert not config.output_attentions
    assert build_meta(config).config.return_dict


def test_an_unknown_activation_is_named_with_its_key(tmp_path):
    with pytest.raises(UserError, match=r"cannot build .*\(hidden_act=unknown\)"):
        build(tmp_path, hidden_act="unknown")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "5", "null", '{"a": ' * 100_000, "[" * 100_000,
     '{"a": ' + "[" * 500 + "]" * 500 + "}", "\x00\xff", '{"model_type": ' + "9" * 10_000 + "}"],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_a_file_that_is_no_configuration(tmp_path, text):
    with pytest.raises(UserError, match=r"config\.json"):
        load_hf_config(write(tmp_path, text))


def test_a_file_that_is_too_large(tmp_path):
    write(tmp_path, json.dumps({"model_type": "llama", "x": "y" * MAX_JSON_BYTES}))
    with pytest.raises(UserError, match="larger than"):
        read_config_json(tmp_path)


@pytest.mark.parametrize("value", ["gptq", ["hqq"], 5, True, {"quant_method": "fp8"}])
def test_a_quantization_config_of_another_kind(tmp_path, value):
    write(tmp_path, json.dumps(LLAMA | {"quantization_config": value}))
    with pytest.raises(UserError, match=r"quantization_config=|already quantized"):
        resolve_source(ModelConfig(name_or_path=str(tmp_path)))


def test_the_configurations_of_transformers_pass():
    """Every default of the installed transformers is in the allowed ranges."""
    for kind, config_class in CONFIG_MAPPING.items():
        try:
            config_json = config_class().to_dict()
        except Exception:  # some need a package, or have defaults that they refuse themselves
            continue
        check_config_json(Path(kind), config_json)


def test_an_installed_attention_package_is_accepted(tmp_path, monkeypatch):
    monkeypatch.setattr(config_check, "find_spec", lambda _: object())
    write(tmp_path, json.dumps(LLAMA | {"attn_implementation": "flash_attention_2"}))
    assert load_hf_config(tmp_path)._attn_implementation == "flash_attention_2"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_pipe_in_the_folder_is_not_read(tmp_path, name):
    write(tmp_path, json.dumps(LLAMA))
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=r"neither a file nor a folder"):
        resolve_source(ModelConfig(name_or_path=str(tmp_path)))


def test_a_table_of_positions_without_weights_is_limited(tmp_path):
    """GPT-J computes its table; no checkpoint shows that it is too long."""
    config = {"model_type": "gptj", "n_embd": 2048, "n_head": 1, "n_layer": 1, "rotary_dim": 1024}
    write(tmp_path, json.dumps(config | {"n_positions": 1 << 23}))
    with pytest.raises(UserError, match="tables of positions, have 32 GiB"):
        build_meta(load_hf_config(tmp_path))
