"""Stock PEFT loads the adapter beside a dense export."""

from dataclasses import replace
from pathlib import Path

import torch
from exports import TOKENS, write_export
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file

from hqqtrain.config.adapter import AdapterConfig
from hqqtrain.formats.peft import load_adapter


def test_stock_peft_loads_base_and_adapter(make_trained, tmp_path):
    trained = make_trained()
    (trained.source / "generation_config.json").write_text('{"eos_token_id": 7}')
    write_export(trained, "dense", tmp_path / "out", adapter_form="separate")
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out" / "adapter").eval()
    torch.testing.assert_close(model(TOKENS).logits, trained.model(TOKENS).logits)
    adapter = load_adapter(tmp_path / "out" / "adapter")
    assert adapter.fingerprint == trained.settings.fingerprint
    assert (tmp_path / "out" / "adapter" / "generation_config.json").is_file()


def test_the_base_is_named_by_its_full_path(make_trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_export(make_trained(), "hqq", Path("out"), adapter_form="separate")
    config = load_adapter(tmp_path / "out" / "adapter").config
    assert config.base_model_name_or_path == str(tmp_path / "out")


def test_the_base_stops_where_the_adapter_was_trained_to_end_its_turns(make_trained, tmp_path):
    trained, folder = make_trained(), tmp_path / "adapter"
    folder.mkdir()
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 7]}')
    for form, stops in (("separate", True), ("none", False)):
        write_export(trained, "humming", tmp_path / form, adapter_form=form, adapter_folder=folder)
        written = (tmp_path / form / "generation_config.json").read_text()
        assert ("[0, 7]" in written) is stops


def test_an_adapter_for_vllm_has_lora_matrices_of_one_rank_alone(make_trained, tmp_path):
    trained = make_trained(adapter=AdapterConfig(r=4))
    name = trained.adapter.modules[0]
    state = dict(trained.adapter.state)
    for matrix, half in (("A", slice(0, 2)), ("B", (slice(None), slice(0, 2)))):
        key = f"base_model.model.{name}.lora_{matrix}.weight"
        state[key] = state[key][half]
    tokens, rows = "base_model.model.model.embed_tokens.token_adapter", torch.ones(1, 32)
    state[f"{tokens}.trainable_tokens_delta"] = rows
    config = replace(
        trained.adapter.config, rank_pattern={name: 2},
        trainable_token_indices={"model.embed_tokens": [3]},
    )  # fmt: skip
    adapter = replace(trained.adapter, config=config, state=state)
    write_export(trained, "humming", tmp_path / "out", adapter=adapter, adapter_form="separate",
                 adapter_folder=trained.source)  # fmt: skip
    written = load_adapter(tmp_path / "out" / "adapter")
    assert not written.config.rank_pattern
    assert not written.tokens
    assert all(written.scaling(module) == 1 for module in written.modules)
    for module in (name, adapter.modules[1]):
        assert len(written.matrix(module, "A")) == 4
        torch.testing.assert_close(written.delta(module), adapter.delta(module))
    embeddings = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(embeddings[3].float(), rows[0])
