"""Resolving names, and the message for every name that cannot be resolved."""

import json

import pytest
import torch

from hqqtrain.common.digest import content_digest
from hqqtrain.common.errors import UserError
from hqqtrain.config.model import ModelConfig
from hqqtrain.models import source
from hqqtrain.models.build import load_hf_config
from hqqtrain.models.source import TINY_FOLDER, resolve_source


def _resolve(name, **more):
    return resolve_source(ModelConfig(name_or_path=str(name), **more))


def _quantized(folder):
    folder.mkdir(parents=True)
    config = {"model_type": "llama", "quantization_config": {"quant_method": "hqqtrain"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_tiny_is_the_packaged_model():
    found = _resolve("tiny")
    assert (found.path, found.kind, found.adapter) == (TINY_FOLDER, "dense", None)
    assert (found.path / "model.safetensors").is_file()
    assert load_hf_config(found.path).hidden_size == 256


def test_a_folder(checkpoint):
    assert _resolve(checkpoint) == source.ModelSource(str(checkpoint), checkpoint, "dense")


def test_a_run_has_a_quantized_model_and_an_adapter(tmp_path):
    folder = _quantized(tmp_path / "run" / "quantized")
    assert _resolve(tmp_path / "run").adapter is None
    (tmp_path / "run" / "adapter").mkdir()
    (tmp_path / "run" / "adapter" / "adapter_config.json").write_text("{}")
    found = _resolve(tmp_path / "run")
    assert (found.path, found.kind) == (folder, "quantized")
    assert found.adapter == tmp_path / "run" / "adapter"


def _control(folder, base):
    """Write the files by which a run that has trained `base` in full precision is recognized."""
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "status.json").write_text("{}")
    (folder / "config.yaml").write_text(
        json.dumps({"quant": {"nbits": None}, "model": {"name_or_path": str(base)}})
    )
    return folder


def test_a_run_that_has_quantized_nothing_stands_for_its_model_and_its_adapter(
    tmp_path, checkpoint
):
    folder = _control(tmp_path / "run", checkpoint)
    further = _control(tmp_path / "further", folder)
    for run in (folder, further):
        expected = source.ModelSource(str(checkpoint), checkpoint, "dense", run / "adapter")
        assert _resolve(run) == expected
    (folder / "config.yaml").write_text('{"quant": {"nbits": 4}, "model": {}}')
    with pytest.raises(UserError, match="a run without quantized/"):
        _resolve(folder)


def test_a_base_whose_name_contains_a_secret_must_be_given_again(tmp_path):
    with pytest.raises(UserError, match="contains a secret"):
        _resolve(_control(tmp_path / "run", "***"))
    with pytest.raises(UserError, match=r"config\.yaml"):  # the run is its own base
        _resolve(_control(tmp_path / "loop", tmp_path / "loop"))


def test_the_quantized_folder_alone_has_no_adapter(tmp_path):
    folder = _quantized(tmp_path / "run" / "quantized")
    found = _resolve(folder)
    assert (found.path, found.kind, found.adapter) == (folder, "quantized", None)


def test_the_configuration_of_a_quantized_model_is_that_of_the_dense_one(tmp_path):
    config = load_hf_config(_quantized(tmp_path / "q"))
    assert getattr(config, "quantization_config", None) is None


def test_a_missing_folder_suggests_its_neighbour(checkpoint):
    with pytest.raises(UserError, match=r"no such folder\. Did you mean 'model'\?"):
        _resolve(checkpoint.with_name("modle"))


def test_a_relative_name_below_an_existing_folder_is_a_path(checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint.parent.parent)
    with pytest.raises(UserError, match=r"no such folder\. Did you mean 'model'\?"):
        _resolve(f"{checkpoint.parent.name}/modell")


def test_a_file_is_not_a_folder(checkpoint):
    with pytest.raises(UserError, match="is a file; give the folder"):
        _resolve(checkpoint / "config.json")


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(UserError, match=r"contains no config\.json.*model\.$"):
        _resolve(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"is an adapter, and no model; .*adapter\.init_from="):
        _resolve(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "model-w4g64").mkdir()
    (tmp_path / "model-w4g64" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"Did you mean .*/model-w4g64\?$"):
        _resolve(tmp_path)


def test_the_run_of_an_export_is_no_model(tmp_path):
    (tmp_path / "status.json").write_text("{}")
    (tmp_path / "export").mkdir()
    with pytest.raises(UserError, match=r"name the export: model\.name_or_path=.*/export\.$"):
        _resolve(tmp_path)
    (tmp_path / "export" / "adapter").mkdir()
    with pytest.raises(UserError, match=r"/export adapter\.init_from=.*/export/adapter\.$"):
        _resolve(tmp_path)


def test_an_unfinished_run(tmp_path):
    (tmp_path / "status.json").write_text("{}")
    with pytest.raises(UserError, match="a run without quantized/"):
        _resolve(tmp_path)


def test_the_packed_weights_of_another_run_are_refused(tmp_path):
    packed = _quantized(tmp_path / "run" / "quantized")
    (packed / "manifest.json").write_text("{}")
    results = {
        "quantized/manifest.json": content_digest(packed.parent, ["quantized/manifest.json"])
    }
    status = json.dumps({"status": "done", "results": results})
    (packed.parent / "status.json").write_text(status)
    assert _resolve(packed).path == packed
    (packed / "manifest.json").write_text("[]")
    for folder in (packed, packed.parent):
        with pytest.raises(UserError, match=r"manifest\.json: is not what the run has written"):
            _resolve(folder)


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_a_broken_config(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        _resolve(tmp_path)


def test_a_model_quantized_by_others(tmp_path):
    config = {"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"already quantized \(fp8\).*hqq, gptq, awq"):
        _resolve(tmp_path)


def test_a_revision_of_a_folder(checkpoint):
    with pytest.raises(UserError, match=r"model\.revision=main"):
        _resolve(checkpoint, revision="main")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "has no model_type"),
        ({"model_type": "nonsense"}, "model_type=nonsense cannot be read"),
        ({"model_type": "x", "auto_map": {"AutoConfig": "a.B"}}, "code of its own, which is never"),
        ({"model_type": "llama", "hidden_size": "wide"}, "hidden_size"),
        ({"model_type": "llama", "hidden_size": 33}, "not a multiple of the number of attention"),
    ],
)
def test_configurations_without_a_valid_model(tmp_path, values, message):
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        load_hf_config(tmp_path)


def test_a_configuration_of_older_transformers(tmp_path):
    """The configuration is like that of Meta-Llama-3-8B on the hub."""
    values = {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": None, "hidden_size": 128,
              "num_attention_heads": 4, "torch_dtype": "bfloat16"}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = load_hf_config(tmp_path)
    assert config.rope_parameters == {"rope_theta": 5e5, "rope_type": "default"}
    assert config.dtype == torch.bfloat16
