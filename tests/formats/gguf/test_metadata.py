"""The keys of an architecture, and a warning where llama.cpp has no attention windows."""

import logging

import pytest
from gguf import GGUFWriter
from transformers import AutoConfig

from hqqtrain.formats.gguf.metadata import write_architecture, write_general

SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 512}  # fmt: skip


def _keys(kind: str, architecture: str, **changes) -> dict:
    writer = GGUFWriter(None, architecture)
    write_architecture(writer, AutoConfig.for_model(kind, **SIZES | changes))
    return {k.split(".", 1)[1]: v.value for k, v in writer.kv_data[0].items()}


def test_the_keys_of_a_llama():
    keys = _keys("llama", "llama", rms_norm_eps=1e-5)
    assert keys == {
        "architecture": "llama", "vocab_size": 96, "context_length": 512, "embedding_length": 64,
        "block_count": 2, "feed_forward_length": 128, "attention.head_count": 4,
        "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.key_length": 16, "attention.value_length": 16, "rope.dimension_count": 16,
        "rope.freq_base": 10000.0,
    }  # fmt: skip


def test_what_gemma2_has_in_addition():
    keys = _keys("gemma2", "gemma2", sliding_window=128)
    assert keys["attn_logit_softcapping"] == 50
    assert keys["final_logit_softcapping"] == 30
    assert keys["attention.sliding_window"] == 128
    assert "attention.sliding_window_pattern" not in keys


def test_an_unusual_order_of_windows_is_written():
    kinds = ["sliding_attention", "full_attention"]
    keys = _keys("gemma3_text", "gemma3", layer_types=kinds)
    assert keys["attention.sliding_window_pattern"] == [True, False]


@pytest.mark.parametrize(
    ("kind", "changes", "warns"),
    [
        ("mistral", {"sliding_window": 128}, True), ("mistral", {"sliding_window": None}, False),
        ("mistral", {"sliding_window": 512}, False), ("phi3", {"sliding_window": 128}, True),
        ("qwen2", {"use_sliding_window": False}, False),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, True),
    ],
)  # fmt: skip
def test_windows_that_llama_cpp_does_not_have(kind, changes, warns, caplog):
    architecture = {"mistral": "llama"}.get(kind, kind)
    with caplog.at_level(logging.WARNING):
        keys = _keys(kind, architecture, **changes)
    assert ("llama.cpp has no attention windows" in caplog.text) == warns
    assert keys.get("attention.sliding_window") == (0 if kind == "phi3" else None)


def test_general_keys():
    writer = GGUFWriter(None, "llama")
    write_general(writer, name="mine", fingerprint="sha256:1", main_type="Q4_K")
    keys = {k: v.value for k, v in writer.kv_data[0].items()}
    assert keys["general.hqqtrain.fingerprint"] == "sha256:1"
    assert (keys["general.name"], keys["general.file_type"]) == ("mine", 14)
