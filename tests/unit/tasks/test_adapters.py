"""Messages about an adapter that does not fit begin with the setting that selected it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from hqqtrain.ckpt.adapter import Base, write_adapter
from hqqtrain.ckpt.manifest import seal
from hqqtrain.config import AdapterConfig, RunConfig, UserError
from hqqtrain.models import Source
from hqqtrain.tasks.adapters import check_start, fill_adapters, load_start, unknown_base

LORA = LoraConfig(r=2, lora_alpha=4, target_modules=["q"])


def _model(**linears: int) -> nn.Module:
    return get_peft_model(nn.ModuleDict({k: nn.Linear(8, n) for k, n in linears.items()}), LORA)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return an adapter of the 8 x 8 linear `q`, trained on the base sha256:ab."""
    (tmp_path / "adapter").mkdir()
    state = get_peft_model_state_dict(_model(q=8))
    write_adapter(tmp_path / "adapter", state, LORA, Base("owner/name", None, "sha256:ab"))
    return tmp_path / "adapter"


@pytest.fixture(params=["resumed", "init_from", "run"])
def selected(request, folder):
    """Return an adapter, selected in each of three ways, and how messages about it begin."""
    adapter = AdapterConfig(init_from=str(folder) if request.param == "init_from" else None)
    source = Source(
        "runs/a", folder.parent, "quantized", folder if request.param == "run" else None
    )
    resumed = folder if request.param == "resumed" else None
    prefixes = {
        "resumed": f"{folder}: the checkpoint that the run resumes from (another run.name",
        "init_from": f"adapter.init_from={folder}: ",
        "run": f"{folder}: the adapter of model.name_or_path=runs/a: ",
    }
    return load_start(RunConfig(adapter=adapter), source, resumed), prefixes[request.param]


def test_other_shape_or_scaling_is_refused(selected):
    start, prefix = selected
    check_start(start, LORA)
    with pytest.raises(UserError, match="was made with r=2, the recipe asks for 3") as error:
        check_start(start, LoraConfig(r=3, lora_alpha=4))
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
        fill_adapters(_model(**linears), start, base, RunConfig())
    assert str(error.value).startswith(prefix)


def test_a_checkpoint_takes_precedence_and_its_values_are_used(folder, tmp_path):
    config = RunConfig(adapter=AdapterConfig(init_from=str(tmp_path / "absent")))
    source = Source("runs/a", tmp_path, "quantized", tmp_path / "absent")
    start, model = load_start(config, source, folder), _model(q=8)
    fill_adapters(model, start, "sha256:ab", config)
    state = get_peft_model_state_dict(model)
    assert all(torch.equal(state[name], start.adapter.state[name]) for name in start.adapter.state)
    assert load_start(RunConfig(), Source("tiny", tmp_path, "dense"), None) is None


def test_an_altered_checkpoint_is_refused(folder):
    seal(folder)
    source, adapter = Source("tiny", folder.parent, "dense"), AdapterConfig(init_from=str(folder))
    load_start(RunConfig(adapter=adapter), source, None)
    weights = folder / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"adapter\.init_from=.*its checksum differs"):
        load_start(RunConfig(adapter=adapter), source, None)


def test_an_adapter_without_a_recorded_base_causes_a_warning(folder):
    source, config = Source("tiny", folder.parent, "dense"), RunConfig()
    known = load_start(config, replace(source, adapter=folder), None)
    assert unknown_base(known, source) == ""
    stock = replace(known, adapter=replace(known.adapter, fingerprint=None))
    assert "names owner/name; if that is not model.name_or_path=tiny" in unknown_base(stock, source)
