"""Small random models, and checkpoints that transformers itself has written."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
)

from hqqtrain.distributed.comm import SINGLE_PROCESS
from hqqtrain.loading.load import load_model
from hqqtrain.models.build import build_meta, load_hf_config
from hqqtrain.models.fqn import expected_shapes
from hqqtrain.models.source import ModelSource
from hqqtrain.models.weights.synthetic import open_weight_source

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    """Return a factory of random causal LMs: `llama`, or `qwen2`, whose attention has biases."""

    def make(kind: str = "llama", **options) -> PreTrainedModel:
        torch.manual_seed(0)
        classes = {"llama": LlamaConfig, "qwen2": Qwen2Config}
        model = AutoModelForCausalLM.from_config(classes[kind](**SIZES | options))
        for name, param in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(param)
        return model.eval()

    return make


@pytest.fixture
def checkpoint(make_model, tmp_path) -> Path:
    """Return the folder of a random Llama with untied embeddings in one model.safetensors."""
    make_model(tie_word_embeddings=False).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


FAMILY_SIZES = SIZES | {
    "head_dim": 8, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "ffn_dim": 48,
    "word_embed_proj_dim": 32, "n_inner": 48, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
"""Sizes of small models of any family, each of which has some of these keys."""


def random_family(kind: str, **options) -> PreTrainedModel:
    """Return a small random causal LM in fp32 of the family `kind`, a `model_type`."""
    known = AutoConfig.for_model(kind)
    names = {*known.to_dict(), *known.attribute_map}
    sizes = {name: size for name, size in FAMILY_SIZES.items() if name in names}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(sizes | options)))
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.2)
    return model.float().eval()


def load_like_a_run(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return the dense model in `folder`, loaded as a run loads it."""
    model = build_meta(load_hf_config(folder), dtype)
    source = ModelSource("model", folder, "dense")
    reader = open_weight_source(source, model, torch.device("cpu"))
    reader.check(expected_shapes(model))
    load_model(model, reader, SINGLE_PROCESS)
    return model.eval()


def assert_same_model(model: PreTrainedModel, truth: PreTrainedModel) -> None:
    """Assert that two models have the same parameters, buffers and logits, bit for bit."""
    options = {"remove_duplicate": False}
    expected = dict([*truth.named_parameters(**options), *truth.named_buffers(**options)])
    found = dict([*model.named_parameters(**options), *model.named_buffers(**options)])
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    tokens = torch.arange(3, 23).view(2, 10)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, truth(tokens).logits)
