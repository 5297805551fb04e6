"""Messages about an adapter that does not fit begin with the setting that selected it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hqqtrain.common.errors import UserError
from hqqtrain.config.adapter import AdapterConfig
from hqqtrain.config.quant import QuantConfig
from hqqtrain.formats.adapter_base import BaseModelRef
from hqqtrain.formats.manifest import seal
from hqqtrain.formats.peft import write_adapter
from hqqtrain.loading.initial_adapter import (
    add_adapter,
    initialize_adapters,
    load_initial_adapter,
    unknown_base_warning,
)
from hqqtrain.models.source import ModelSource
from hqqtrain.nn.replace import quantize_model
from hqqtrain.rundir.layout import RunLayout
from hqqtrain.rundir.results import result_digests

LORA = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"])
SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip


def _model() -> nn.Module:
    return get_peft_model(LlamaForCausalLM(LlamaConfig(**SIZES)), LORA)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return an adapter of the two `q_proj` of a small Llama, trained on the base sha256:ab."""
    (tmp_path / "adapter").mkdir()
    state = get_peft_model_state_dict(_model())
    write_adapter(tmp_path / "adapter", state, LORA, BaseModelRef("owner/name", None, "sha256:ab"))
    return tmp_path / "adapter"


@pytest.fixture(params=["resumed", "init_from", "run"])
def selected(request, folder):
    """Return an adapter, selected in each of three ways, and how messages about it begin."""
    adapter = AdapterConfig(init_from=str(folder) if request.param == "init_from" else None)
    source = ModelSource(
        "runs/a", folder.parent, "quantized", folder if request.param == "run" else None
    )
    resumed = folder if request.param == "resumed" else None
    prefixes = {
        "resumed": f"{folder}: the checkpoint that the run resumes from (another run.name",
        "init_from": f"adapter.init_from={folder}: ",
        "run": f"{folder}: the adapter of model.name_or_path=runs/a: ",
    }
    return load_initial_adapter(adapter, source, resumed), prefixes[request.param]


def _plan(start, *, skip=(), **adapter):
    """Add an adapter like that of `start` to a quantized Llama, with other settings."""
    config = AdapterConfig(**{"r": 2, "alpha": 4, "target_modules": ["q_proj"]} | adapter)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    quantize_model(model, QuantConfig(group_size=None, skip=["lm_head", *skip]))
    return add_adapter(model, config, start, adapts=True)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"r": 3}, r"was made with r=2, the configuration asks for 3. Use adapter\.r=2"),
        ({"alpha": 5}, r"was made with lora_alpha=4, the .* asks for 5. Use adapter\.alpha=4"),
        ({"kind": "rslora"}, r"use_rslora=False, the .* asks for True. Use adapter\.kind=lora"),
        ({"target_modules": ["q_proj", "v_proj"]}, r"now selects model\.layers\.0\..*\.v_proj"),
        ({"target_modules": ["v_proj"]}, r"select .*q_proj. Use .*target_modules=\[q_proj\]"),
    ],
)  # fmt: skip
def test_another_shape_scaling_or_modules_are_refused(selected, adapter, message):
    start, prefix = selected
    _plan(start)
    with pytest.raises(UserError, match=message) as error:
        _plan(start, **adapter)
    assert str(error.value).startswith(prefix)


def test_a_tied_module_in_full_is_refused(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    get_peft_model(model, config).save_pretrained(tmp_path)
    source = ModelSource("owner/name", tmp_path, "dense")
    start = load_initial_adapter(AdapterConfig(init_from=str(tmp_path)), source, None)
    tied = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    for adapts in (True, False):
        with pytest.raises(UserError, match="lm_head, whose weight is tied"):
            add_adapter(tied, AdapterConfig(), start, adapts=adapts)


def test_a_negative_alpha_gets_no_advice_that_fails(folder):
    weights = folder / "adapter_model.safetensors"
    save_file(load_file(weights), weights, {"format": "pt"})
    _edit(folder, lora_alpha=-4)
    source = ModelSource("owner/name", folder.parent, "dense")
    start = load_initial_adapter(AdapterConfig(init_from=str(folder)), source, None)
    with pytest.raises(UserError, match=r"lora_alpha=-4, .*never negative.*evaluated and exported"):
        _plan(start)


def test_all_differences_are_reported_at_once(selected):
    start, prefix = selected
    other = {"r": 3, "alpha": 5, "kind": "rslora", "target_modules": ["v_proj"]}
    with pytest.raises(UserError) as error:
        _plan(start, **other)
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    assert all(line.startswith(prefix) for line in lines)


def test_another_base_is_refused(selected):
    start, prefix = selected
    with pytest.raises(UserError, match="but this base") as error:
        initialize_adapters(_plan(start)[0], start, "sha256:cd", AdapterConfig(), 0)
    assert str(error.value).startswith(prefix)


def test_ranks_and_alphas_of_single_modules_are_continued(tmp_path):
    folder = tmp_path / "adapter"
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj"], rank_pattern={"layers.1.*q_proj": 3},
        alpha_pattern={"layers.0.*": 8},
    )  # fmt: skip
    get_peft_model(LlamaForCausalLM(LlamaConfig(**SIZES)), config).save_pretrained(folder)
    start = load_initial_adapter(
        AdapterConfig(init_from=str(folder)), ModelSource("tiny", tmp_path, "dense"), None
    )
    model, lora = _plan(start)
    ranks = [p.shape[0] for n, p in model.named_parameters() if "lora_A" in n]
    layers = [m for n, m in model.named_modules() if n.endswith("q_proj")]
    assert ranks == [2, 3]
    assert [layer.scaling["default"] for layer in layers] == [4.0, 4 / 3]
    assert lora.rank_pattern == {"model.layers.1.self_attn.q_proj": 3}


def test_a_checkpoint_takes_precedence_and_its_values_are_used(folder, tmp_path):
    config = AdapterConfig(init_from=str(tmp_path / "absent"))
    source = ModelSource("runs/a", tmp_path, "quantized", tmp_path / "absent")
    start, model = load_initial_adapter(config, source, folder), _model()
    initialize_adapters(model, start, "sha256:ab", config, 0)
    state = get_peft_model_state_dict(model)
    assert all(torch.equal(state[name], start.adapter.state[name]) for name in start.adapter.state)
    dense = ModelSource("tiny", tmp_path, "dense")
    assert load_initial_adapter(AdapterConfig(), dense, None) is None


def test_an_altered_checkpoint_is_refused(folder):
    seal(folder)
    source, adapter = (
        ModelSource("tiny", folder.parent, "dense"),
        AdapterConfig(init_from=str(folder)),
    )
    load_initial_adapter(adapter, source, None)
    weights = folder / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"adapter\.init_from=.*its checksum differs"):
        load_initial_adapter(adapter, source, None)


def _edit(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora_alpha": 64}, "has lora_alpha=64, but the adapter was trained with 4, as"),
        ({"use_rslora": True}, "has use_rslora=true, but the adapter was trained with false"),
        ({"alpha_pattern": {"q_proj": 8}}, "has alpha_pattern={.*}, but .* trained with {}"),
        ({"r": 3}, "gives it the rank 3"),
        ({"r": 3, "rank_pattern": {"q_proj": 2}}, "has r=3, but the adapter was trained with 2"),
    ],
)  # fmt: skip
def test_an_edited_scaling_is_refused_by_its_key(folder, values, message):
    source = ModelSource("runs/a", folder.parent, "quantized")
    _edit(folder, lora_dropout=0.5)  # without effect after the training
    load_initial_adapter(AdapterConfig(init_from=str(folder)), source, None)
    _edit(folder, **values)
    with pytest.raises(UserError, match=rf"adapter\.init_from=.*adapter: .*{message}"):
        load_initial_adapter(AdapterConfig(init_from=str(folder)), source, None)


@pytest.mark.parametrize("record", ["", "{", "[1]", "null", '{"unknown": 1}'])
def test_a_scaling_that_is_not_recorded_is_accepted(folder, record):
    weights = folder / "adapter_model.safetensors"
    save_file(load_file(weights), weights, {"format": "pt", "hqqtrain_scaling": record})
    _edit(folder, lora_alpha=64)
    source = ModelSource("runs/a", folder.parent, "quantized")
    start = load_initial_adapter(AdapterConfig(init_from=str(folder)), source, None)
    assert start.adapter.config.lora_alpha == 64


def test_the_adapter_of_a_finished_run_must_be_the_one_that_it_has_written(folder):
    run = RunLayout(folder.parent)
    results = {"status": "done", "results": result_digests(run)}
    run.status_json.write_text(json.dumps(results))
    source = ModelSource("runs/a/quantized", folder.parent, "quantized")
    config = AdapterConfig(init_from=str(folder))
    load_initial_adapter(config, source, None)
    (folder.parent / "link").symlink_to(folder)
    for path in (folder / "adapter_config.json", folder / "adapter_model.safetensors"):
        content = path.read_bytes()
        path.write_bytes(content[:-2] + b" " + content[-2:])
        for name in (folder, folder.parent / "link"):
            with pytest.raises(UserError, match=f"{path.name}: is not what the run has written"):
                load_initial_adapter(AdapterConfig(init_from=str(name)), source, None)
        path.write_bytes(content)


def test_an_adapter_without_a_recorded_base_causes_a_warning(folder):
    source, config = ModelSource("tiny", folder.parent, "dense"), AdapterConfig()
    known = load_initial_adapter(config, replace(source, adapter=folder), None)
    assert unknown_base_warning(known, source) == ""
    stock = replace(known, adapter=replace(known.adapter, fingerprint=None))
    assert "names owner/name; if that is not model.name_or_path=tiny" in unknown_base_warning(
        stock, source
    )
