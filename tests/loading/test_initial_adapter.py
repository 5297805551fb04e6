"""Messages about an adapter that does not fit begin with the setting that selected it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from hqqtrain.common.errors import UserError
from hqqtrain.config.groups import AdapterConfig
from hqqtrain.formats.manifest import seal
from hqqtrain.formats.peft import BaseModelRef, write_adapter
from hqqtrain.loading.initial_adapter import (
    check_initial_adapter,
    initialize_adapters,
    load_initial_adapter,
    unknown_base_warning,
)
from hqqtrain.models.source import ModelSource

LORA = LoraConfig(r=2, lora_alpha=4, target_modules=["q"])


def _model(**linears: int) -> nn.Module:
    return get_peft_model(nn.ModuleDict({k: nn.Linear(8, n) for k, n in linears.items()}), LORA)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return an adapter of the 8 x 8 linear `q`, trained on the base sha256:ab."""
    (tmp_path / "adapter").mkdir()
    state = get_peft_model_state_dict(_model(q=8))
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


def test_other_shape_or_scaling_is_refused(selected):
    start, prefix = selected
    check_initial_adapter(start, LORA)
    with pytest.raises(UserError, match="was made with r=2, the recipe asks for 3") as error:
        check_initial_adapter(start, LoraConfig(r=3, lora_alpha=4))
    assert str(error.value).startswith(prefix)


@pytest.mark.parametrize(
    ("linears", "base", "message"),
    [
        ({"q": 8}, "sha256:cd", "but this base"),
        ({"q": 9}, "sha256:ab", "has no base_model.model.q.lora"),
    ],
)
def test_another_base_or_other_modules_are_refused(selected, linears, base, message):
    start, prefix = selected
    with pytest.raises(UserError, match=message) as error:
        initialize_adapters(_model(**linears), start, base, AdapterConfig(), 0)
    assert str(error.value).startswith(prefix)


def test_a_checkpoint_takes_precedence_and_its_values_are_used(folder, tmp_path):
    config = AdapterConfig(init_from=str(tmp_path / "absent"))
    source = ModelSource("runs/a", tmp_path, "quantized", tmp_path / "absent")
    start, model = load_initial_adapter(config, source, folder), _model(q=8)
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


def test_an_adapter_without_a_recorded_base_causes_a_warning(folder):
    source, config = ModelSource("tiny", folder.parent, "dense"), AdapterConfig()
    known = load_initial_adapter(config, replace(source, adapter=folder), None)
    assert unknown_base_warning(known, source) == ""
    stock = replace(known, adapter=replace(known.adapter, fingerprint=None))
    assert "names owner/name; if that is not model.name_or_path=tiny" in unknown_base_warning(
        stock, source
    )
