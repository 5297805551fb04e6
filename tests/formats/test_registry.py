"""The formats of `export.format`: what they write, and that no adapter is lost."""

import re
from itertools import chain

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hqqtrain.common.errors import UserError
from hqqtrain.config import export
from hqqtrain.formats.base import ModelExport
from hqqtrain.formats.manifest import check_sealed
from hqqtrain.formats.packed import model_tensors, placeholders
from hqqtrain.formats.peft import load_adapter
from hqqtrain.formats.quantized_settings import QuantizedSettings, read_quantized_settings
from hqqtrain.formats.registry import FORMATS, check_format

NO_LAYERS = QuantizedSettings({}, "")
TOKENS = torch.arange(24).view(2, 12)


def _model_export(trained, **changes) -> ModelExport:
    facts = {"model": trained.model, "settings": trained.settings, "hf_config": trained.hf_config,
             "tokenizer": trained.source, "source_dtype": lambda name: None,
             "adapter": trained.adapter}  # fmt: skip
    return ModelExport(**facts | changes)


def test_the_configuration_allows_the_registered_formats():
    """The configuration repeats the names because the command line must not import torch."""
    assert tuple(FORMATS) == export.EXPORT_FORMATS
    assert all(name == export_format.name for name, export_format in FORMATS.items())


def test_dense_merges_the_adapter(make_trained, tmp_path):
    trained = make_trained()
    FORMATS["dense"].write(_model_export(trained, adapter_form="merge"), tmp_path / "export")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype="auto").eval()
    torch.testing.assert_close(dense(TOKENS).logits, trained.model(TOKENS).logits)


def test_packed_is_the_quantized_folder(make_trained, tmp_path):
    trained = make_trained()
    FORMATS["packed"].write(_model_export(trained), tmp_path / "export")
    assert read_quantized_settings(tmp_path / "export") == trained.settings
    written = load_file(tmp_path / "export" / "model.safetensors")
    truth = dict(chain(model_tensors(trained.model), placeholders(trained.settings)))
    assert written.keys() == truth.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in truth.items())


def test_packed_keeps_the_dtype_of_the_source(make_trained, tmp_path):
    dtypes = {"model.norm.weight": torch.bfloat16}
    export = _model_export(make_trained(), source_dtype=dtypes.get)
    FORMATS["packed"].write(export, tmp_path / "export")
    written = load_file(tmp_path / "export" / "model.safetensors")
    assert written["model.norm.weight"].dtype == torch.bfloat16
    assert written["model.embed_tokens.weight"].dtype == torch.float32


def test_a_packed_export_has_the_adapter_beside_it(make_trained, tmp_path):
    trained = make_trained()
    export = _model_export(trained, adapter_form="separate", adapter_folder=trained.source)
    FORMATS["packed"].write(export, tmp_path / "export")
    check_sealed(tmp_path / "export")
    adapter = load_adapter(tmp_path / "export" / "adapter")
    assert adapter.fingerprint == trained.settings.fingerprint
    assert adapter.config.base_model_name_or_path == str(tmp_path / "export")
    assert all(torch.equal(adapter.state[k], v) for k, v in trained.adapter.state.items())


@pytest.mark.parametrize(
    ("name", "asked", "has_adapter", "form"),
    [
        ("dense", "auto", True, "merge"), ("dense", "separate", True, "separate"),
        ("dense", "auto", False, "none"), ("packed", "auto", True, "separate"),
        ("mlx", "none", True, "none"),
    ],
)  # fmt: skip
def test_the_form_of_the_adapter(tmp_path, name, asked, has_adapter, form):
    assert FORMATS[name].adapter_form(asked, tmp_path if has_adapter else None, NO_LAYERS) == form


@pytest.mark.parametrize(
    ("name", "asked", "has_adapter", "message"),
    [
        ("packed", "merge", True, "export.adapter=merge: export.format=packed allows separate"),
        ("dense", "merge", False, "export.adapter=merge: the model has no adapter"),
    ],
)
def test_a_form_that_is_not_possible_is_refused(tmp_path, name, asked, has_adapter, message):
    with pytest.raises(UserError, match=re.escape(message)):
        FORMATS[name].adapter_form(asked, tmp_path if has_adapter else None, NO_LAYERS)


def test_a_format_that_cannot_hold_the_model_names_those_that_can(make_trained):
    trained = make_trained(axis=0, group_size=16)
    with pytest.raises(UserError) as error:
        check_format("mlx", trained.settings, trained.hf_config)
    message = str(error.value)
    assert "quant.axis=0" in message
    assert message.endswith("Use dense, packed, hqq, or quantize with other settings.")


def test_a_format_of_few_bits_refuses_a_model_without_quantized_layers(make_trained):
    hf_config = make_trained().hf_config
    for name in ("packed", "hqq", "mlx", "humming", "compressed-tensors"):
        with pytest.raises(UserError, match=r"no quantized layers .* Use dense, gguf, or"):
            check_format(name, NO_LAYERS, hf_config)
    check_format("dense", NO_LAYERS, hf_config)
