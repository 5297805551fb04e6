"""The logits of a text do not depend on the texts that a model has computed before."""

from typing import Any

import pytest
import torch
from architectures import SMALL, small_config, small_model

from hqqtrain.models.build import build_meta
from hqqtrain.models.rope import max_batched_length, reset_dynamic_rope

DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
DEFAULT = {"rope_type": "default", "rope_theta": 1e4}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8, "original_max_position_embeddings": 32}  # fmt: skip
SHORT = SMALL | {"max_position_embeddings": 32}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SHORT | {"rope_parameters": DYNAMIC}),
    "qwen2": ("qwen2", SHORT | {"rope_parameters": DYNAMIC}),
    "one kind of attention of two": ("gemma3_text", SHORT | {
        "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"full_attention": DYNAMIC, "sliding_attention": DEFAULT},
    }),
    "longrope": ("phi3", SMALL | {"rope_parameters": LONGROPE,
                                  "original_max_position_embeddings": 32}),
}  # fmt: skip
LENGTHS = (20, 60, 32, 100, 40, 33, 20, 60)
"""Shorter and longer than the original length of 32, up and down."""


@torch.no_grad()
def logits(model, length: int) -> torch.Tensor:
    return model(input_ids=torch.arange(length)[None] * 7 % 512, use_cache=False).logits


@pytest.mark.parametrize("name", CASES)
def test_earlier_texts_do_not_change_later_ones(name):
    config = small_config(*CASES[name])
    model = small_model(config)
    reset_dynamic_rope(model)
    for length in LENGTHS:
        fresh = small_model(config)
        assert torch.equal(logits(model, length), logits(fresh, length)), length


def test_transformers_itself_depends_on_earlier_texts():
    """Otherwise this module is no longer needed."""
    model = small_model(small_config(*CASES["llama"]))
    first = logits(model, 40)
    logits(model, 100)
    assert not torch.allclose(logits(model, 40), first)


def test_models_are_built_with_it():
    model = build_meta(small_config(*CASES["llama"]))
    assert model.model.rotary_emb._forward_pre_hooks


@pytest.mark.parametrize(
    ("settings", "length"),
    [
        (CASES["llama"], 32),
        (CASES["one kind of attention of two"], 32),
        (CASES["longrope"], 32),
        (("llama", SHORT), None),
        (("llama", SHORT | {"rope_parameters": LINEAR}), None),
        (("bloom", {"hidden_size": 64, "n_layer": 1, "n_head": 4}), None),
    ],
)  # fmt: skip
def test_the_length_up_to_which_texts_share_a_batch(settings, length):
    model = build_meta(small_config(*settings))
    assert max_batched_length(model) == length
    if length is None:
        return
    real = small_model(small_config(*settings))
    batch = torch.arange(2 * 60).view(2, 60) * 7 % 512
    with torch.no_grad():
        together = real(input_ids=batch, use_cache=False).logits[0, :length]
        alone = small_model(small_config(*settings))(input_ids=batch[:1, :length], use_cache=False)
    assert not torch.allclose(together, alone.logits[0], atol=1e-3)
