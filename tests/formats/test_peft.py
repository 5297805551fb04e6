"""Adapters are stock PEFT files, which PEFT reads without a warning."""

import json
import math
import os
import warnings

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hqqtrain.common.errors import UserError
from hqqtrain.config.groups import AdapterConfig
from hqqtrain.formats.adapter_card import AdapterCard
from hqqtrain.formats.dense import dense_tensors, export_dense
from hqqtrain.formats.packed import model_tensors
from hqqtrain.formats.peft import load_adapter
from hqqtrain.formats.peft import save_adapter as save

TOKENS = torch.arange(24).view(2, 12)


def _card(**more) -> AdapterCard:
    facts = {"base": "owner/name", "fingerprint": "sha256:ab", "nbits": 2, "group_size": 16,
             "axis": 1, "solver": "hqq", "bits_per_weight": 4.0}  # fmt: skip
    return AdapterCard(**facts | more)


def _save(trained, folder, **more):
    card = _card(fingerprint=trained.settings.fingerprint, **more)
    save(trained.adapter.state, trained.adapter.config, folder, card=card)
    return folder


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_stock_peft_on_the_dequantized_base_gives_the_same_logits(make_trained, tmp_path, kind):
    trained = make_trained("qwen2", adapter=AdapterConfig(kind=kind, r=4, alpha=8, dropout=0.1))
    folder = _save(trained, tmp_path / "adapter")
    tensors = dense_tensors(model_tensors(trained.model), trained.settings, dtype=torch.float32)
    export_dense(tensors, tmp_path / "dense", hf_config=trained.hf_config, source=trained.source,
                 dtype=torch.float32)  # fmt: skip
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
    with pytest.raises(UserError, match=r"runs/a/adapter: trained on the quantized base sha256:"):
        adapter.check_base("sha256:00", "runs/a/adapter")


def _stock(folder, model, **config):
    """Save an adapter made by PEFT itself on a dense model, with nonzero B."""
    targets = {"target_modules": ["q_proj", "down_proj"]}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **targets | config))
    for name, param in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(param)
    model.save_pretrained(folder)
    return model


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
    model = _stock(tmp_path / "a", make_model(), **config)
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
    model = _stock(tmp_path / "a", make_model(), r=4, layers_to_transform=[1])
    adapter = load_adapter(tmp_path / "a")
    layers = dict(model.base_model.model.named_modules())
    assert adapter.modules == ["model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj"]
    for name in adapter.modules:
        torch.testing.assert_close(adapter.delta(name), layers[name].get_delta_weight("default"))


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1, 2]},
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
    _stock(tmp_path / "a", make_model("qwen2", tie_word_embeddings=False), **config)
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


LAYERS = {
    f"model.layers.{i}.{name}": shape
    for i in range(2)
    for name, shape in {"self_attn.q_proj": (32, 32), "mlp.down_proj": (32, 48)}.items()
}
"""The linear layers of a small Llama that `_stock` adapts."""


@pytest.fixture
def stock(make_model, tmp_path):
    """Return the folder of a stock adapter, and a function that changes its two files."""
    _stock(tmp_path / "a", make_model(), r=4)
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
        ({}, {"lm_head.weight": torch.ones(96, 32)}, "is a weight of the base, not one"),
        (
            {"target_modules": ["q_proj", "down_proj", "w1"]},
            {f"{Q}.w1.lora_A.weight": torch.ones(4, 8), f"{Q}.w1.lora_B.weight": torch.ones(8, 4)},
            "adapts .*w1, which is not a quantized linear layer of this model",
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
