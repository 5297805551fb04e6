"""Models in GGUF, compared with what transformers makes of the same files."""

import numpy as np
import pytest
import torch
from foreign_models import dequantized, load_foreign, open_folder
from gguf_models import write_gguf
from transformers import AutoModelForCausalLM

from hqqtrain.common.errors import UserError
from hqqtrain.config.model import ModelConfig
from hqqtrain.models.foreign import gguf_reader
from hqqtrain.models.source import resolve_source

MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
SIMPLE = dict(zip(MATRICES, ["Q4_0", "Q4_1", "Q8_0", "Q5_0", "Q5_1", "Q8_0", "Q4_1"], strict=True))
K_TYPES = dict(zip(MATRICES, ["Q4_K", "Q6_K", "Q3_K", "Q2_K", "Q5_K", "Q4_K", "Q6_K"], strict=True))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HQQTRAIN_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("architecture", "types"),
    [("llama", SIMPLE), ("llama", K_TYPES), ("qwen2", SIMPLE), ("qwen3", {"attn_q": "Q8_0"})],
)
def test_weights_and_logits_are_those_of_transformers(tmp_path, architecture, types):
    file = write_gguf(tmp_path / "m.gguf", types, architecture=architecture)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32
    )
    reader = open_folder(file)
    assert len(reader.layers) == len(types)
    rounded = "the scales of 3 layers (Q3_K, Q6_K) are rounded to fp16"
    assert (rounded in reader.notes) == (types is K_TYPES)
    for module, layer in reader.layers.items():
        weight = theirs.get_submodule(module).weight.detach()
        ours = dequantized(reader, module, torch.float32)
        if layer.kind.is_exact:
            torch.testing.assert_close(ours, weight, rtol=1e-6, atol=1e-7)
        else:  # a scale is rounded to fp16
            torch.testing.assert_close(ours, weight, rtol=2**-10, atol=1e-7)
    ids = torch.arange(16)[None]
    with torch.no_grad():
        logits = load_foreign(tmp_path)(ids).logits
        torch.testing.assert_close(logits, theirs(ids).logits, rtol=1e-3, atol=1e-3)


def test_quantized_embeddings_and_head_are_dense_here(tmp_path):
    types = {"attn_q": "Q4_0", "token_embd": "Q8_0", "output": "Q6_K"}
    file = write_gguf(tmp_path / "m.gguf", types)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32
    )
    reader = open_folder(file)
    assert list(reader.layers) == ["model.layers.0.self_attn.q_proj"]
    assert reader.notes == (
        "model.embed_tokens (Q8_0) is dequantized, and stays dense in fp16",
        "lm_head (Q6_K) is dequantized, and stays dense in fp16",
    )
    rows = [slice(60, 64), slice(1, 3)]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        expected = theirs.get_parameter(name).detach().half()
        assert reader.dtype(name) == torch.float16
        assert torch.equal(reader.read(name), expected)
        assert torch.equal(reader.read(name, rows), torch.cat([expected[r] for r in rows]))
    norm = theirs.model.norm.weight.detach()
    assert torch.equal(reader.read("model.norm.weight", [slice(9, 99)]), norm[9:99])


def test_a_group_without_scale_is_constant(tmp_path, monkeypatch):
    def blocks(name, rows, count):
        data = np.full((rows, count, 20), 0xFF, np.uint8)
        data[..., :4] = np.array([0, 0.25], np.float16).view(np.uint8)
        return data

    monkeypatch.setattr("gguf_models.random_blocks", blocks)
    reader = open_folder(write_gguf(tmp_path / "m.gguf", {"ffn_up": "Q4_1"}))
    weight = dequantized(reader, "model.layers.0.mlp.up_proj", torch.float32)
    assert torch.equal(weight, torch.full((256, 256), 0.25))


def test_the_tokenizer_next_to_the_file_is_used(tmp_path):
    file = write_gguf(tmp_path / "m.gguf", {"attn_q": "Q4_0"})
    source = resolve_source(ModelConfig(name_or_path=str(file)))
    assert source.tokenizer == tmp_path
    assert source.weights_file == file
    assert not list(source.path.glob("tokenizer*"))


def test_a_file_that_is_cut_after_it_was_prepared(tmp_path):
    file = write_gguf(tmp_path / "m.gguf", {"attn_q": "Q4_0"})
    source = resolve_source(ModelConfig(name_or_path=str(file)))
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(UserError, match=r"m\.gguf: is damaged or incomplete at"):
        gguf_reader.GgufReader(source.path, file)


def test_a_tensor_that_the_model_does_not_have(tmp_path):
    more = {"blk.0.attn_q_norm.weight": np.ones(128, np.float32)}
    with pytest.raises(UserError, match=r"has .*q_norm\.weight, but the model of its config"):
        load_foreign(write_gguf(tmp_path / "m.gguf", {"attn_q": "Q4_0"}, more=more))


def test_a_type_that_cannot_be_taken_over(tmp_path):
    blocks = np.zeros((4, 8), np.int8)
    more = {"blk.0.ffn_gate_inp.weight": blocks}
    file = write_gguf(tmp_path / "m.gguf", {"attn_q": "Q4_0"}, more=more)
    with pytest.raises(UserError, match=r"has the type I8\. Types .* Q4_0, Q4_1"):
        open_folder(file)
