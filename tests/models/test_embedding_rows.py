"""Rows for new tokens, in models whose embeddings and heads have other names and parts."""

import pytest
from random_models import random_family

from hqqtrain.common.errors import UserError
from hqqtrain.models import embedding_rows
from hqqtrain.models.build import build_meta
from hqqtrain.models.causal_lm import vocabulary_size
from hqqtrain.models.embedding_rows import (
    add_embedding_rows,
    check_head_is_dense,
    vocabulary_tensors,
)

TENSORS = {
    "llama": ["model.embed_tokens.weight", "lm_head.weight"],
    "gemma3_text": ["model.embed_tokens.weight"],
    "phi": ["model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"],
    "opt": ["model.decoder.embed_tokens.weight"],
    "gpt_neox": ["gpt_neox.embed_in.weight", "lm_head.weight"],
}


@pytest.mark.parametrize("kind", TENSORS)
def test_embeddings_and_head_get_the_missing_rows(kind):
    config = random_family(kind).config
    model = build_meta(config)
    assert add_embedding_rows(config, model, (), None) is model
    assert add_embedding_rows(config, model, (3, 95), None) is model
    assert config.vocab_size == 96
    resized = add_embedding_rows(config, model, (3, 99), None)
    assert vocabulary_size(resized) == config.vocab_size == 100
    assert vocabulary_tensors(resized) == dict.fromkeys(TENSORS[kind], 100)


def test_a_model_that_does_not_grow_is_refused(monkeypatch):
    config = random_family("llama").config
    model = build_meta(config)
    monkeypatch.setattr(embedding_rows, "build_meta", lambda *_: model)
    with pytest.raises(UserError, match=r"LlamaForCausalLM have no rows for 2 new tokens"):
        add_embedding_rows(config, model, (96, 97), None)


def test_a_quantized_head_gets_no_rows():
    model = build_meta(random_family("llama").config)
    check_head_is_dense(model, ["model.layers.0.mlp.up_proj"])
    with pytest.raises(UserError, match="lm_head is quantized"):
        check_head_is_dense(model, ["lm_head"])
