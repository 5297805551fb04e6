"""Stock PEFT loads the adapter beside a dense export."""

from pathlib import Path

import torch
from exports import TOKENS, write_export
from peft import AutoPeftModelForCausalLM

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
