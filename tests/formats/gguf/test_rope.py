"""Scaled rotary embeddings become llama.cpp's keys, and tensors that divide the frequencies."""

import pytest
import torch
from gguf import GGUFWriter
from transformers import AutoConfig

from hqqtrain.formats.gguf.rope import rope_parameters, rope_refusals, rope_tensors, write_rope

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.5],
        "long_factor": [2.0, 4.0], "original_max_position_embeddings": 4096}  # fmt: skip


def _keys(config, dim: int) -> dict:
    writer = GGUFWriter(None, "llama")
    write_rope(writer, config, dim)
    prefix = "llama.rope."
    return {k.removeprefix(prefix): v.value for k, v in writer.kv_data[0].items() if prefix in k}


def test_llama3_divides_low_frequencies_by_the_factor():
    """Waves shorter than a quarter of the original length stay, those longer than it are scaled."""
    config = AutoConfig.for_model("llama", head_dim=128, rope_parameters=LLAMA3)
    factors = rope_tensors(config, 128)["rope_freqs.weight"]
    waves = 2 * torch.pi * 5e5 ** (torch.arange(0, 128, 2) / 128)
    torch.testing.assert_close(factors[waves < 2048], torch.ones(int((waves < 2048).sum())))
    torch.testing.assert_close(factors[waves > 8192], torch.full_like(factors[waves > 8192], 8.0))
    between = factors[(waves > 2048) & (waves < 8192)]
    assert ((between > 1) & (between < 8)).all()
    assert _keys(config, 128) == {"dimension_count": 128, "freq_base": 5e5}


@pytest.mark.parametrize(
    ("parameters", "keys"),
    [
        ({"rope_type": "default"}, {}),
        ({"rope_type": "linear", "factor": 2.0},
         {"scaling.type": "linear", "scaling.factor": 2.0}),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
         {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 512}),
        ({"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0, "attention_factor": 1.25,
          "original_max_position_embeddings": 512},
         {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 512,
          "scaling.yarn_beta_fast": 16.0, "scaling.yarn_attn_factor": 1.25}),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, {"dimension_count": 32}),
    ],
)  # fmt: skip
def test_the_keys_of_a_type(parameters, keys):
    config = AutoConfig.for_model(
        "llama", head_dim=64, rope_parameters={"rope_theta": 1e4, **parameters}
    )
    assert not list(rope_refusals(config))
    assert _keys(config, 64) == {"dimension_count": 64, "freq_base": 1e4} | keys
    assert not rope_tensors(config, 64)


def test_longrope_has_two_tensors_and_a_factor():
    config = AutoConfig.for_model("phi3", rope_parameters=LONG, max_position_embeddings=131072,
                                  original_max_position_embeddings=4096, hidden_size=16,
                                  num_attention_heads=4)  # fmt: skip
    assert {k: v.tolist() for k, v in rope_tensors(config, 4).items()} == {
        "rope_factors_long.weight": [2.0, 4.0], "rope_factors_short.weight": [1.0, 1.5],
    }  # fmt: skip
    keys = _keys(config, 4)
    assert keys["scaling.type"] == "longrope"
    assert keys["scaling.original_context_length"] == 4096
    # sqrt(1 + log(32) / log(4096)), as Phi-3 has it
    assert keys["scaling.attn_factor"] == pytest.approx(1.190238, rel=1e-5)


def test_gemma3_has_two_bases():
    config = AutoConfig.for_model("gemma3_text")
    assert _keys(config, 256) == {
        "dimension_count": 256, "freq_base": 1e6, "freq_base_swa": 1e4
    }  # fmt: skip
    assert rope_parameters(config)[1] is not None
    config.rope_parameters["sliding_attention"]["rope_type"] = "linear"
    assert list(rope_refusals(config)) == ["llama.cpp scales no layers with a window (linear)"]
