"""A small copy has every kind of layer of its original, and few parameters."""

import pytest
import torch
from architectures import SMALL
from transformers import CONFIG_MAPPING

from hqqtrain.models.build import build_meta
from hqqtrain.models.families.structure import find_decoder_layers
from hqqtrain.models.small_copy import VOCABULARY, small_copies


def first_copy(name: str, **settings):
    config = CONFIG_MAPPING[name](**settings)
    return next(small_copies(config, build_meta(config)))


@pytest.mark.parametrize(
    ("name", "settings", "kinds"),
    [
        ("jamba", {}, {"JambaMambaDecoderLayer", "JambaAttentionDecoderLayer"}),
        ("qwen3_next", {"num_hidden_layers": 48}, {"Qwen3NextDecoderLayer"}),
        ("llama", {"num_hidden_layers": 126, "hidden_size": 16384, "num_attention_heads": 128,
                   "num_key_value_heads": 8, "intermediate_size": 53248}, {"LlamaDecoderLayer"}),
    ],
)  # fmt: skip
def test_a_large_model_has_a_small_copy(name, settings, kinds):
    copy = first_copy(name, **settings)
    layers = find_decoder_layers(copy)
    assert layers is not None
    assert len(layers) <= 12
    assert {type(layer).__name__ for layer in layers} == kinds
    assert sum(p.numel() for p in copy.parameters()) < 8e7
    assert copy.get_input_embeddings().num_embeddings == VOCABULARY
    assert copy.dtype == torch.float32
    assert not copy.training


def test_kinds_that_only_a_setting_tells_apart():
    types = ["sliding_attention"] * 5 + ["full_attention"]
    copy = first_copy("gemma3_text", **SMALL | {"num_hidden_layers": 18, "layer_types": types * 3})
    assert copy.config.layer_types == types


def test_the_last_copies_have_all_layers():
    """The last layers of some models refer to earlier ones, so a part of them cannot run."""
    config = CONFIG_MAPPING["llama"](**SMALL | {"num_hidden_layers": 5})
    depths = [len(find_decoder_layers(m) or ()) for m in small_copies(config, build_meta(config))]
    assert depths == [2, 5]


def test_lists_of_a_rotary_embedding_fit_the_heads():
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32,
            "original_max_position_embeddings": 64, "rope_theta": 1e4, "factor": 4.0}  # fmt: skip
    copy = first_copy("phi3", **SMALL | {"hidden_size": 256, "rope_parameters": rope})
    assert len(copy.config.rope_parameters["short_factor"]) == 8
    assert copy(input_ids=torch.arange(9)[None], use_cache=False).logits.isfinite().all()
