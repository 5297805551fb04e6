"""A model built on meta and loaded tensor by tensor equals that of `from_pretrained`."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from hqqtrain.config.model import ModelConfig
from hqqtrain.distributed.comm import Communicator
from hqqtrain.loading.load import load_model
from hqqtrain.models.build import (
    build_meta,
    load_hf_config,
    restore_buffers,
)
from hqqtrain.models.fqn import expected_shapes, retie_weights, tied_names
from hqqtrain.models.source import resolve_source, shipped_folder
from hqqtrain.models.weights.safetensors import SafetensorsReader

ALONE = Communicator(0, 1, torch.device("cpu"))
TOKENS = torch.arange(20).view(2, 10)


def _load(folder, dtype=None):
    model = build_meta(load_hf_config(folder), dtype)
    reader = SafetensorsReader(folder, tied_names(model))
    assert reader.check(expected_shapes(model)) == []
    load_model(model, reader, ALONE)
    return model.eval(), reader


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_loaded_model_equals_from_pretrained(make_model, tmp_path, kind, tied):
    make_model(kind, tie_word_embeddings=tied).save_pretrained(tmp_path)
    model, reader = _load(tmp_path)
    truth = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(model(TOKENS).logits, truth(TOKENS).logits)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert reader.bytes_read == reader.total_bytes
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])


def test_the_bundled_model_loads_and_predicts():
    source = resolve_source(ModelConfig())
    model, _ = _load(source.path, dtype=torch.float32)
    truth = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    assert torch.equal(model(TOKENS).logits, truth(TOKENS).logits)


def test_parameters_take_the_dtype_and_buffers_keep_theirs(checkpoint):
    model, reader = _load(checkpoint, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert reader.bytes_read == reader.total_bytes


def test_scaled_rope_buffers_are_computed_again(make_model):
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip
    real = make_model(rope_parameters=rope)
    model = build_meta(real.config).to_empty(device="cpu")
    model.model.rotary_emb.inv_freq.fill_(float("nan"))
    restore_buffers(model, "cpu")
    for name, buffer in real.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name


def test_to_empty_unties_parameters_and_tie_ties_them_again(make_model):
    model = build_meta(make_model(tie_word_embeddings=True).config).to_empty(device="cpu")
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    retie_weights(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("tiny", 0.0057),
        ("meta-llama/Meta-Llama-3-8B", 8.03),
        ("meta-llama/meta-llama-3-70b", 70.55),
        ("meta-llama/Llama-2-70b-hf", 68.98),
        ("meta-llama/Llama-3.1-405B", 405.85),
    ],
)
def test_shipped_configurations_build_without_network_access(name, billions):
    model = build_meta(load_hf_config(shipped_folder(name)))
    count = sum(p.numel() for p in model.parameters()) / 1e9
    assert count == pytest.approx(billions, rel=0.02)
    assert all(p.is_meta for p in model.parameters())


def test_other_models_have_no_shipped_configuration():
    assert shipped_folder("owner/another") is None


@pytest.mark.parametrize("source", ["pretrained", "synthetic"])
def test_the_shipped_configuration_of_tiny_is_the_loaded_one(source):
    assert resolve_source(ModelConfig(source=source)).path == shipped_folder("tiny")
