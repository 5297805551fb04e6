"""PEFT and transformers load an adapter of ours only on the base that it was trained on."""

import json
import logging
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftMixedModel, PeftModel
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from stock_adapters import save_stock_adapter
from transformers import AutoModelForCausalLM

from hqqtrain import HqqTrainConfig
from hqqtrain.common.errors import UserError

FINGERPRINT = "sha256:[0-9a-f]{64}"
TOKENS = torch.arange(16).view(2, 8)
load = AutoModelForCausalLM.from_pretrained


@pytest.fixture
def trained(make_trained):
    return make_trained("qwen2", nbits=2, solver="rtn")


@pytest.fixture
def adapter(trained, tmp_path: Path) -> Path:
    """Return the adapter of a run directory that has quantized/, too."""
    base = trained.save(tmp_path / "run" / "quantized")
    return trained.save_adapter(tmp_path / "run" / "adapter", str(base))


def check_logits(model: Any, trained: Any) -> None:
    with torch.no_grad():
        assert torch.equal(model.eval()(TOKENS).logits, trained.model(TOKENS).logits)


def from_pretrained(model: Any, adapter: Path, stock: Path) -> None:
    PeftModel.from_pretrained(model, adapter.parent, subfolder="adapter")


def second(model: Any, adapter: Path, stock: Path) -> None:
    PeftModel.from_pretrained(model, stock).load_adapter(adapter, "second")


def mixed(model: Any, adapter: Path, stock: Path) -> None:
    PeftMixedModel.from_pretrained(model, stock).load_adapter(str(adapter), adapter_name="second")


def hotswap(model: Any, adapter: Path, stock: Path) -> None:
    hotswap_adapter(PeftModel.from_pretrained(model, stock), str(adapter), "default")


def of_transformers(model: Any, adapter: Path, stock: Path) -> None:
    model.load_adapter(peft_model_id=str(adapter))


@pytest.mark.parametrize("load_adapter", [from_pretrained, second, mixed, hotswap, of_transformers])
def test_every_way_to_load_checks_the_base(
    load_adapter: Callable, adapter: Path, trained, tmp_path: Path
):
    dense, stock = trained.source, tmp_path / "stock"
    save_stock_adapter(stock, load(dense), r=4, lora_alpha=8, target_modules="all-linear")
    load_adapter(load(adapter.parent / "quantized"), adapter, stock)
    with pytest.raises(UserError, match=f"trained on the quantized base {FINGERPRINT}, but hqqt"):
        load_adapter(load(dense), adapter, stock)
    other = load(dense, quantization_config=HqqTrainConfig(nbits=4, group_size=16))
    with pytest.raises(UserError, match=f"{FINGERPRINT}, but this base is {FINGERPRINT}. Load"):
        load_adapter(other, adapter, stock)


def test_a_refused_adapter_leaves_the_model_as_it_was(adapter: Path, trained):
    model = load(trained.source)
    with pytest.raises(UserError):
        model.load_adapter(str(adapter))
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_a_model_that_is_quantized_while_it_loads_is_the_base(adapter: Path, trained):
    config = HqqTrainConfig(nbits=2, group_size=16, solver="rtn")
    model = load(trained.source, quantization_config=config)
    check_logits(PeftModel.from_pretrained(model, adapter), trained)


def test_dequantized_weights_are_the_same_base(adapter: Path, trained, tmp_path: Path):
    dense = load(adapter.parent / "quantized").dequantize()
    dense.save_pretrained(tmp_path / "dense")
    for model in (dense, load(tmp_path / "dense")):
        adapted = PeftModel.from_pretrained(model, adapter).eval()
        torch.testing.assert_close(adapted(TOKENS).logits, trained.model(TOKENS).logits)
    claimed = load(trained.source)  # as the message says
    claimed.config.hqqtrain_base_fingerprint = trained.settings.fingerprint
    PeftModel.from_pretrained(claimed, adapter)


def test_an_adapter_of_a_dense_base(trained, adapter: Path, tmp_path: Path):
    trained.settings = type(trained.settings)({}, f"sha256:{'0' * 64}")
    control = trained.save_adapter(tmp_path / "control")
    PeftModel.from_pretrained(load(trained.source), control)
    with pytest.raises(UserError, match="but this base is"):
        PeftModel.from_pretrained(load(adapter.parent / "quantized"), control)


def test_an_adapter_that_does_not_say_whether_its_base_is_quantized(
    trained, adapter: Path, caplog: pytest.LogCaptureFixture
):
    file, old = adapter / "adapter_model.safetensors", {}
    old["hqqtrain_base_fingerprint"] = trained.settings.fingerprint
    save_file(load_file(file), file, metadata=old)
    with caplog.at_level(logging.WARNING, "hqqtrain"):
        PeftModel.from_pretrained(load(trained.source), adapter)
    assert "on any other model it adds noise" in caplog.text


def test_an_adapter_that_is_saved_again_still_records_its_base(
    adapter: Path, trained, tmp_path: Path
):
    base, stock = adapter.parent / "quantized", tmp_path / "stock"
    names = ["peft", "peft/second"]
    model = PeftModel.from_pretrained(load(base), adapter)
    model.load_adapter(adapter, "second")
    model.save_pretrained(tmp_path / "peft")
    model = load(base)
    model.load_adapter(str(adapter))
    with suppress(ValueError):  # some releases save adapters with a later PEFT only
        model.save_pretrained(tmp_path / "transformers")
        names.append("transformers")
    for name in names:
        PeftModel.from_pretrained(load(base), tmp_path / name)
        with pytest.raises(UserError, match="trained on the quantized base"):
            PeftModel.from_pretrained(load(trained.source), tmp_path / name)
    save_stock_adapter(stock, load(trained.source))
    PeftModel.from_pretrained(load(base), stock).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/adapter_model.safetensors").read_bytes() == (
        stock / "adapter_model.safetensors"
    ).read_bytes()


def test_auto_classes_load_the_base_that_an_adapter_names(adapter: Path, trained, tmp_path: Path):
    for auto in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        check_logits(auto.from_pretrained(adapter), trained)
    moved = (tmp_path / "run").rename(tmp_path / "moved") / "adapter"
    check_logits(AutoPeftModelForCausalLM.from_pretrained(moved), trained)
    config = json.loads((moved / "adapter_config.json").read_text())
    alone = shutil.copytree(moved, tmp_path / "alone")
    config["base_model_name_or_path"] = str(trained.source)
    (alone / "adapter_config.json").write_text(json.dumps(config))
    for auto in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        with pytest.raises(UserError, match="alone: trained on the quantized base"):
            auto.from_pretrained(alone)
