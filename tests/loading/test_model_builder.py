"""A loaded model has the source's values, and saves and loads them without any change."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hqqtrain.common.errors import UserError
from hqqtrain.loading.model_builder import (
    LoadedModel,
    build_model,
    build_reference,
    read_quantization_errors,
    wrap_for_execution,
)
from hqqtrain.loading.plan import plan_model
from hqqtrain.models.offload import offloads_meta
from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain.nn.staging import StagedTensors
from hqqtrain.quant.error import error_ratio, squared_error
from hqqtrain.tasks.context import Run
from hqqtrain.tasks.model import plan_settings

TOKENS = torch.arange(12)[None]


@pytest.fixture
def run(make_config, start_run):
    with start_run(make_config()) as run:
        yield run


def _build(run: Run, packed: Path | None = None, on_layer=lambda _: None) -> LoadedModel:
    plan, config = plan_model(plan_settings(run.config), run.runtime), run.config
    return build_model(
        plan, run.runtime.strategy, config.adapter, config.train.seed,
        packed=packed, on_layer=on_layer,
    )  # fmt: skip


def _logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS, use_cache=False).logits


def test_weights_and_errors(run: Run, tiny_model: Path):
    names: list[str] = []
    loaded, source = _build(run, on_layer=names.append), load_file(tiny_model / "model.safetensors")
    assert names == list(loaded.layer_errors) == list(loaded.settings.modules)
    sums = torch.zeros(2, dtype=torch.float64)
    for name, module in loaded.model.base_model.model.named_modules():
        if isinstance(module, HQQLinear):
            key = name.replace(".base_layer", "")
            pair = squared_error(source[f"{key}.weight"].float(), module.dequantize().float())
            assert loaded.layer_errors[key] == pytest.approx(error_ratio(*pair.tolist()), rel=1e-6)
            sums += pair
    assert loaded.relative_error == pytest.approx(error_ratio(*sums.tolist()), rel=1e-6)
    embedding = loaded.model.get_input_embeddings().weight
    assert torch.equal(embedding.bfloat16(), source["model.embed_tokens.weight"])
    assert loaded.bytes_read == loaded.plan.reader.total_bytes
    assert loaded.seconds == max(stats.seconds for stats in loaded.load_stats) > 0


@pytest.mark.parametrize("offloads", ["offloads_meta", "offloads_parameters"])
def test_offloaded_weights_are_the_same(run: Run, tmp_path: Path, monkeypatch, offloads: str):
    monkeypatch.setattr(StagedTensors, "copies_on_cpu", True)
    plain = _build(run)
    plain.save_packed(tmp_path / "plain", run.runtime.comm, extra_json={})
    expected = _logits(wrap_for_execution(plain, run.runtime.strategy).model)
    monkeypatch.setattr(run.runtime.strategy, offloads, True)
    loaded = _build(run)
    loaded.save_packed(tmp_path / "offloaded", run.runtime.comm, extra_json={})
    assert loaded.settings == plain.settings
    for path in (tmp_path / "plain").iterdir():
        assert path.read_bytes() == (tmp_path / "offloaded" / path.name).read_bytes()
    runnable = wrap_for_execution(loaded, run.runtime.strategy)
    for _ in range(2):
        assert torch.equal(_logits(runnable.model), expected)
    assert offloads_meta(runnable.model) == (offloads == "offloads_meta")


def test_packed_weights_come_back_to_the_bit(run: Run, tmp_path: Path):
    loaded, folder = _build(run), tmp_path / "packed"
    loaded.save_packed(folder, run.runtime.comm, extra_json={"made_from.json": {"a": 1}})
    assert json.loads((folder / "made_from.json").read_text()) == {"a": 1}
    again = _build(run, packed=folder)
    for (name, ours), theirs in zip(
        loaded.model.state_dict().items(), again.model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    assert again.settings == loaded.settings
    assert (again.layer_errors, again.relative_error) == (
        loaded.layer_errors, loaded.relative_error,
    )  # fmt: skip
    assert again.bytes_read < loaded.bytes_read


def test_altered_packed_weights_are_refused_by_their_fingerprint(run: Run, tmp_path: Path):
    _build(run).save_packed(tmp_path / "packed", run.runtime.comm, extra_json={})
    (file,) = (tmp_path / "packed").glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.W_q"][0, 0] ^= 1
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match="a file was altered"):
        _build(run, packed=tmp_path / "packed")


def test_a_folder_without_errors(tmp_path: Path):
    assert read_quantization_errors(tmp_path) == ({}, None)
    assert read_quantization_errors(None) == ({}, None)


def test_without_adapter_is_the_model_before_training(run: Run):
    loaded = _build(run)
    runnable = wrap_for_execution(loaded, run.runtime.strategy)
    before = _logits(runnable.model)
    for name, param in runnable.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(param)
    after = _logits(runnable.model)
    assert not torch.equal(before, after)
    with runnable.without_adapter():  # a fresh adapter stays enabled: it changed nothing at first
        assert torch.equal(_logits(runnable.model), after)
    started = replace(runnable, plan=replace(loaded.plan, initial_adapter=object()))
    with started.without_adapter():
        torch.testing.assert_close(_logits(runnable.model), before)


def test_the_reference_is_the_full_precision_model(run: Run, tiny_model: Path):
    plan, runtime = plan_model(plan_settings(run.config), run.runtime), run.runtime
    reference, bytes_read = build_reference(
        plan, runtime.strategy, torch.float32, runtime.preemption
    )
    stock = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    assert torch.equal(_logits(reference), _logits(stock))
    assert bytes_read == plan.reader.total_bytes
    assert not any(param.requires_grad for param in reference.parameters())
