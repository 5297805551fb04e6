"""Small random models, and checkpoints that transformers itself has written."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config

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
