"""Every key of adapter_config.json is understood, or the adapter is refused by it."""

import json
import math
import os

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    PrefixTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from stock_adapters import save_stock_adapter

from hqqtrain.common.errors import UserError
from hqqtrain.formats.peft import load_adapter


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_2"},
        {"init_lora_weights": "olora"},
        {"alora_invocation_tokens": [5, 6]},
        {"layer_replication": [[0, 1], [0, 2]]},
        {"use_qalora": True},
    ],
    ids=str,
)
def test_more_than_lora_is_refused_by_its_key(make_model, tmp_path, config):
    save_stock_adapter(tmp_path / "a", make_model("qwen2", tie_word_embeddings=False), **config)
    with pytest.raises(
        UserError, match=f"{tmp_path}/a: adapter_config.json has {next(iter(config))}="
    ):
        load_adapter(tmp_path / "a")


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        LoHaConfig(target_modules=["q_proj"]),
        AdaLoraConfig(target_modules=["q_proj"], total_step=10),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_another_type_of_adapter_is_refused(make_model, tmp_path, config):
    get_peft_model(make_model(), config).save_pretrained(tmp_path / "a")
    with pytest.raises(UserError, match=f"has peft_type={config.peft_type.value}: must be LORA"):
        load_adapter(tmp_path / "a")


LAYERS = {
    f"model.layers.{i}.{name}": shape
    for i in range(2)
    for name, shape in {"self_attn.q_proj": (32, 32), "mlp.down_proj": (32, 48)}.items()
}
"""The linear layers of a small Llama that `save_stock_adapter` adapts."""


@pytest.fixture
def stock(make_model, tmp_path):
    """Return the folder of a stock adapter, and a function that changes its two files."""
    save_stock_adapter(tmp_path / "a", make_model(), r=4)
    folder = tmp_path / "a"
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"

    def change(keys=None, **tensors):
        values = json.loads(config.read_text()) | (keys or {})
        config.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))
        state = load_file(weights) | tensors
        save_file({k: v.contiguous() for k, v in state.items() if v is not ...}, weights)
        return folder

    return change


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("keys", "tensors", "message"),
    [
        ({"a_later_key": True}, {}, "a_later_key=true: PEFT .* does not know this key"),
        ({"a_later_rank": 3}, {}, "a_later_rank=3"),
        ({"use_dora": 1}, {}, "use_dora=1"),
        ({"init_lora_weights": "PiSSA"}, {}, "init_lora_weights=PiSSA"),
        ({"init_lora_weights": "a_later_one"}, {}, "init_lora_weights=a_later_one"),
        ({"init_lora_weights": 1}, {}, "init_lora_weights=1"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, {}, "loftq"),
        ({"init_lora_weights": "lora_ga"}, {}, "init_lora_weights=lora_ga"),
        ({"init_lora_weights": "corda"}, {}, "init_lora_weights=corda"),
        ({"target_parameters": ["experts.w"]}, {}, "target_parameters"),
        ({"task_type": "SEQ_CLS"}, {}, "task_type=SEQ_CLS: must be CAUSAL_LM"),
        ({"peft_type": ...}, {}, "peft_type=null: must be LORA"),
        ({"r": 0}, {}, "r=0: must be an integer of at least 1"),
        ({"r": 10**12}, {}, "gives it the rank 1000000000000"),
        ({"r": "4"}, {}, "r=4: must be an integer"),
        ({"r": True}, {}, "r=true: must be an integer"),
        ({"lora_alpha": None}, {}, "lora_alpha=null: must be a number"),
        ({"lora_alpha": 10**400}, {}, "must be a number"),
        ({"lora_alpha": float("nan")}, {}, "lora_alpha=NaN: must be a number"),
        ({"rank_pattern": ["q_proj"]}, {}, "rank_pattern=.* must be a mapping"),
        ({"rank_pattern": {"q_proj": 8}}, {}, "gives it the rank 8"),
        ({"rank_pattern": {"(": 8}}, {}, "cannot be used"),
        ({"rank_pattern": {"(.+)+!": 8}}, {}, "cannot be used"),
        ({"target_modules": "(.+)+!"}, {}, "cannot be used"),
        ({"target_modules": 5}, {}, "target_modules=5: must be a string or a list"),
        ({"target_modules": ["q_proj"]}, {}, "has matrices of model.layers.0.mlp.down_proj"),
        ({"target_modules": ["q_proj", "down_proj", "up_proj"]}, {}, "no matrices of .*up_proj"),
        ({"layers_to_transform": [1]}, {}, "target_modules of adapter_config.json does not select"),
        ({"layers_to_transform": "1"}, {}, "layers_to_transform=1: must be an integer"),
        ({}, {f"{Q}.lora_A.weight": ...}, "pair of LoRA matrices"),
        ({}, {f"{Q}.lora_A.weight": torch.ones(4, 31)}, "belongs to another model"),
        ({}, {f"{Q}.lora_A.weight": torch.ones(3, 32)}, "pair of LoRA matrices"),
        ({}, {f"{Q}.lora_A.weight": torch.full((4, 32), math.nan)}, "contains NaN or infinity"),
        ({}, {f"{Q}.lora_A.weight": torch.ones(4, 32, dtype=torch.int8)}, "the dtype I8"),
        ({}, {f"{Q}.lora_A.weight": ..., f"{Q}.lora_B.weight": ...}, "no matrices of .*q_proj"),
        ({}, {f"{Q}.lora_magnitude_vector": torch.ones(32)}, "is not one of a pair"),
        ({}, {"lm_head.weight": torch.ones(96, 32)}, "a weight of the base, which modules_to_save"),
        (
            {"target_modules": ["q_proj", "down_proj", "w1"]},
            {f"{Q}.w1.lora_A.weight": torch.ones(4, 8), f"{Q}.w1.lora_B.weight": torch.ones(8, 4)},
            "adapts .*w1, which is not a linear layer of this model",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_hostile_adapters_are_refused(stock, keys, tensors, message, monkeypatch):
    monkeypatch.setattr("hqqtrain.formats.adapter_config._PATTERN_SECONDS", 0.2)
    linears = LAYERS | {"model.layers.0.mlp.up_proj": (48, 32)}
    with pytest.raises(UserError, match=message) as error:
        load_adapter(stock(keys, **tensors), origin="adapter.init_from=a", linears=linears)
    assert str(error.value).startswith("adapter.init_from=a: ")


MODELS = {"tied": {"tie_word_embeddings": True}, "untied": {"tie_word_embeddings": False}}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("tokens", [[3, 5], {"embed_tokens": [5]}], ids=str)
def test_what_peft_trains_of_the_base_is_read(make_model, tmp_path, model, tokens):
    dense = make_model("qwen2", **MODELS[model])
    shapes = {name: tuple(param.shape) for name, param in dense.named_parameters()}
    config = {"modules_to_save": ["model.norm"], "trainable_token_indices": tokens}
    stock = save_stock_adapter(tmp_path / "a", dense, **config)
    with torch.no_grad():
        for param in stock.parameters():
            if param.requires_grad:
                param.normal_()
    stock.save_pretrained(tmp_path / "a")
    adapter = load_adapter(tmp_path / "a", tensors=shapes)
    ids = tokens if isinstance(tokens, list) else tokens["embed_tokens"]
    assert adapter.config.trainable_token_indices == {"model.embed_tokens": ids}
    assert adapter.config.modules_to_save == ["model.norm"]
    assert adapter.base_tensors == ["model.norm.weight", "model.embed_tokens.weight"]
    merged = stock.merge_and_unload()
    base = {name: param.clone() for name, param in merged.named_parameters()}
    base["model.embed_tokens.weight"][ids] = 0
    for name in adapter.base_tensors:
        found = adapter.replaced(name, base[name])
        assert torch.equal(found, merged.get_parameter(name)), name
    assert adapter.replaced("model.layers.0.x", base["model.norm.weight"]) is not None


ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
NORM = "base_model.model.model.norm.weight"


@pytest.mark.parametrize(
    ("keys", "tensors", "message"),
    [
        ({"modules_to_save": ["norm"]}, {}, "modules_to_save has norm, but no tensor"),
        ({"modules_to_save": "norm"}, {}, "must be a list of strings"),
        (
            {"modules_to_save": ["norm"]},
            {NORM: torch.ones(31)},
            r"\[31\], but the model has \[32\]",
        ),
        ({"trainable_token_indices": [1]}, {}, "is set, but no row is saved"),
        ({"trainable_token_indices": [-1]}, {}, "a list of token ids"),
        ({"trainable_token_indices": {"embed_tokens": 3}}, {}, "a list of token ids"),
        ({"trainable_token_indices": [1]}, {ROWS: torch.ones(2, 32)}, "a row for each of the tok"),
        ({"trainable_token_indices": [1]}, {ROWS: torch.ones(1, 31)}, "belongs to another model"),
        ({"trainable_token_indices": [96]}, {ROWS: torch.ones(1, 32)}, "only 96 rows"),
        ({}, {ROWS: torch.ones(1, 32)}, "a row for each of the tokens"),
    ],
)
def test_parts_of_another_base_are_refused(stock, keys, tensors, message):
    shapes = {"model.norm.weight": (32,), "model.embed_tokens.weight": (96, 32)}
    with pytest.raises(UserError, match=message):
        load_adapter(stock(keys, **tensors), linears=LAYERS, tensors=shapes)


@pytest.mark.parametrize(
    "keys",
    [
        {"a_later_key": False, "another": None, "a_third": {}, "a_fourth": []},
        {"peft_version": "9.0", "auto_mapping": {"base_model_class": "x"}, "revision": None},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}, "lora_dropout": 0.5},
        {"init_lora_weights": "mica", "megatron_core": "megatron.core", "fan_in_fan_out": True},
        {"corda_config": {"corda_method": "kpm"}, "use_qalora": False, "qalora_group_size": 32},
        {"target_modules": None, "task_type": None},
        {"target_modules": "all-linear"},
    ],
)
def test_keys_without_effect_are_no_obstacle(stock, keys):
    adapter = load_adapter(stock(keys), linears=LAYERS)
    assert adapter.modules == sorted(LAYERS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "nested"),
        ("[]", "no JSON object"),
        ("", "not a PEFT configuration"),
        ("\x00", "not a PEFT configuration"),
        (" " * (1 << 24) + "{}", "larger than 16777216 bytes"),
    ],
    ids=lambda value: value[:10],
)
def test_a_config_that_is_no_json_object_is_refused(stock, content, message):
    folder = stock()
    (folder / "adapter_config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        load_adapter(folder)


def test_what_is_no_regular_file_is_not_read(stock, tmp_path):
    folder = stock()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / name).rename(tmp_path / name)
        os.mkfifo(folder / name)
        with pytest.raises(UserError, match=f"contains no {name}"):
            load_adapter(folder)
        (folder / name).unlink()
        (folder / name).symlink_to(name)  # a loop
        with pytest.raises(UserError, match=f"contains no {name}"):
            load_adapter(folder)
        (folder / name).unlink()
        (folder / name).symlink_to(tmp_path / name)  # as in the hub's cache
    assert load_adapter(folder).modules == sorted(LAYERS)


def test_the_advice_for_a_folder_without_an_adapter_fits(stock, tmp_path):
    folder = stock()
    (tmp_path / "run").mkdir()
    folder.rename(tmp_path / "run" / "adapter")
    with pytest.raises(UserError, match=r"give the folder of the adapter, .*run/adapter"):
        load_adapter(tmp_path / "run")
    weights = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    weights.rename(weights.with_name("adapter_model.bin"))
    with pytest.raises(UserError, match="is a pickle, which hqqtrain never reads"):
        load_adapter(tmp_path / "run" / "adapter")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "x/" * 3000])
def test_a_name_that_no_folder_has_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=r"contains no adapter_config\.json"):
        load_adapter(tmp_path / name)
