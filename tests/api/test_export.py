"""`export` writes a model in memory, or one in a folder."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import hqqtrain
from hqqtrain.common.errors import UserError

TOKENS = torch.arange(16).view(2, 8)


@pytest.fixture
def adapted(quantized):
    model = hqqtrain.add_lora(quantized, r=2)
    for name, param in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(param, std=0.05)
    return model.eval()


def logits_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def test_a_model_in_memory(adapted, tokenizer, tmp_path: Path):
    comparison = hqqtrain.export(adapted, tmp_path / "dense", "dense", tokenizer)
    assert comparison.max_error == 0
    assert (tmp_path / "dense" / "tokenizer.json").exists()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits_of(merged), logits_of(adapted), rtol=1e-4, atol=1e-4)


def test_a_folder(adapted, tokenizer, tmp_path: Path):
    hqqtrain.export(adapted, tmp_path / "packed", "packed", tokenizer)
    assert (tmp_path / "packed" / "adapter").is_dir()
    again = hqqtrain.load_quantized(tmp_path / "packed", adapter=tmp_path / "packed" / "adapter")
    assert torch.equal(logits_of(again), logits_of(adapted))
    hqqtrain.export(tmp_path / "packed", tmp_path / "hqq", "hqq")
    assert (tmp_path / "hqq" / "tokenizer.json").exists()


def test_what_is_refused(adapted, dense, tmp_path: Path):
    for arguments, message in (
        ({"format": "awq"}, "format=awq: allowed are dense"),
        ({"format": "hqq", "adapter": "merge"}, "adapter=merge: format=hqq allows"),
        ({"format": "compressed-tensors"}, "format=compressed-tensors: "),
        ({"format": "gguf", "gguf_type": "Q5"}, "gguf_type=Q5: allowed are auto"),
        ({"format": "gguf"}, "tokenizer=None: a file of format=gguf contains it"),
        ({"format": "mlx", "max_error": 0.0}, "max_error=0: a weight of"),
    ):
        with pytest.raises(UserError, match=f"^export: {message}"):
            hqqtrain.export(adapted, tmp_path / "out", **arguments)
        assert not (tmp_path / "out").exists()
