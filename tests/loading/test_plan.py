"""The plan of a model, from shapes alone: what is quantized, which adapter it has, every fault."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hqqtrain.common.errors import UserError
from hqqtrain.loading.plan import ModelPlan, plan_model
from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain.tasks.inference import quantize
from hqqtrain.tasks.model import plan_settings


@pytest.fixture
def plan(start_run):
    """Return a function that plans the model of a configuration."""

    def plan(config) -> ModelPlan:
        with start_run(config) as run:
            return plan_model(plan_settings(config), run.runtime)

    return plan


def test_a_finetune_plans_adapters_on_quantized_linears(plan, make_config):
    found = plan(make_config())
    named = dict(found.model.named_parameters())
    assert {param.device.type for param in named.values()} == {"meta"}
    assert found.num_linears == 7
    assert (found.is_packed, found.initial_adapter) == (False, None)
    assert {name for name, param in named.items() if param.requires_grad} == {
        name for name in named if "lora_" in name
    }
    assert found.lora.r == 2
    assert found.source_dtype("model.norm.weight") == torch.bfloat16
    assert found.source_dtype("no.such.tensor") is None


def test_other_tasks_plan_no_new_adapter(plan, make_config):
    found = plan(make_config("quantize"))
    assert found.lora is None
    assert not any(param.requires_grad for param in found.model.parameters())


def test_a_packed_source_decides_the_settings(plan, make_config, start_run, tmp_path: Path):
    with start_run(make_config("quantize", run={"name": "packed"})) as run:
        quantize(run)
    source = {"name_or_path": str(tmp_path / "runs" / "packed")}
    found = plan(make_config("eval", model=source, quant={"nbits": 2, "group_size": 8}))
    layers = [module for module in found.model.modules() if isinstance(module, HQQLinear)]
    assert found.is_packed
    assert {(layer.spec.nbits, layer.spec.group_size) for layer in layers} == {(4, 16)}


def test_a_checkpoint_without_a_tensor_is_refused(plan, make_config, tiny_model: Path):
    config = json.loads((tiny_model / "config.json").read_text())
    config["num_hidden_layers"] = 2
    (tiny_model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"model\.layers\.1\."):
        plan(make_config())


def test_tensors_that_are_not_used_are_logged(plan, make_config, tiny_model: Path, caplog):
    file = tiny_model / "model.safetensors"
    save_file(load_file(file) | {"extra": torch.ones(2)}, file, {"format": "pt"})
    with caplog.at_level(logging.WARNING):
        plan(make_config())
    assert f"{tiny_model}: not used: 1 tensor, such as extra" in caplog.text


def test_sequences_longer_than_the_models_are_warned_about(plan, make_config, caplog):
    with caplog.at_level(logging.WARNING):
        plan(make_config(train={"max_seq_len": 65}))
    assert "train.max_seq_len=65: the model was made for 64 tokens at most" in caplog.text


@pytest.mark.parametrize("change", [{"out_features": 33}, None])
def test_quantized_modules_that_the_model_lacks(plan, make_config, start_run, tmp_path, change):
    with start_run(make_config("quantize", run={"name": "packed"})) as run:
        quantize(run)
    file = tmp_path / "runs" / "packed" / "quantized" / "config.json"
    config = json.loads(file.read_text())
    modules = config["quantization_config"]["modules"]
    name = next(iter(modules))
    if change is None:
        modules["model.layers.7.mlp.up_proj"] = modules[name]
    else:
        modules[name] |= change
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json: quantization_config has"):
        plan(make_config("eval", model={"name_or_path": str(file.parent)}))
