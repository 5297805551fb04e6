"""Models of which llama.cpp would compute something else are refused."""

import re

import pytest
from transformers import AutoConfig

from hqqtrain.formats.gguf.families import FAMILIES, family_refusals, head_dim
from hqqtrain.formats.quantized_settings import QuantizedSettings

NOTHING = QuantizedSettings({}, "")


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_defaults_of_a_family_fit(kind):
    assert not list(family_refusals(AutoConfig.for_model(kind), NOTHING))


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("opt", {}, "opt is none of the families llama, .*export.llama_cpp"),
        ("llama", {"hidden_act": "relu"}, "llama.cpp has no relu in llama"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
         "llama.cpp has no rotary embedding of the type dynamic"),
        ("gemma2", {"query_pre_attn_scalar": 100},
         "query_pre_attn_scalar=100, for which llama.cpp has 256"),
    ],
)  # fmt: skip
def test_what_llama_cpp_does_not_have(kind, changes, reason):
    config = AutoConfig.for_model(kind, **changes)
    (found,) = family_refusals(config, NOTHING)
    assert re.search(reason, found)


def test_the_scale_of_gemmas_27b():
    shape = {"num_hidden_layers": 46, "hidden_size": 4608, "num_attention_heads": 32,
             "head_dim": 128}  # fmt: skip
    for scalar, fits in ((144, True), (128, False)):
        config = AutoConfig.for_model("gemma2", query_pre_attn_scalar=scalar, **shape)
        assert (not list(family_refusals(config, NOTHING))) == fits


def test_a_quantized_head_needs_a_tensor_of_its_own():
    settings = QuantizedSettings({"lm_head": None}, "")  # type: ignore[dict-item]
    assert list(family_refusals(AutoConfig.for_model("gemma"), settings))
    assert not list(family_refusals(AutoConfig.for_model("gemma3_text"), settings))


def test_the_size_of_a_head():
    sizes = {"hidden_size": 64, "num_attention_heads": 4}
    assert head_dim(AutoConfig.for_model("llama", head_dim=32, **sizes)) == 32
    assert head_dim(AutoConfig.for_model("phi3", **sizes)) == 16
