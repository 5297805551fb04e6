"""Names on disk do not depend on what wraps the model."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from hqqtrain.config.adapter import AdapterConfig
from hqqtrain.config.quant import QuantConfig
from hqqtrain.distributed.comm import Communicator
from hqqtrain.loading.load import load_model
from hqqtrain.models.build import build_meta, load_hf_config
from hqqtrain.models.fqn import (
    base_model,
    base_tensors,
    expected_shapes,
    is_adapter,
    retie_weights,
    strip_wrappers,
    tied_names,
)
from hqqtrain.models.weights.safetensors import SafetensorsReader
from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain.nn.lora import lora_config
from hqqtrain.nn.replace import quantize_model


@pytest.mark.parametrize(
    ("wrapped", "plain"),
    [
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("base_model.model.model.layers.0.q.base_layer.W_q", "model.layers.0.q.W_q"),
        ("model.layers.0._checkpoint_wrapped_module.q.W_q", "model.layers.0.q.W_q"),
        ("model.layers.0._orig_mod.q.W_q", "model.layers.0.q.W_q"),
        ("base_layers.0.weight", "base_layers.0.weight"),
    ],
)
def test_plain_name(wrapped, plain):
    assert strip_wrappers(wrapped) == plain


def test_is_adapter():
    assert is_adapter("model.layers.0.q.lora_A.default.weight")
    assert not is_adapter("model.flora_norm.weight")


def _meta(folder, **quant):
    model = build_meta(load_hf_config(folder))
    quantize_model(model, QuantConfig(nbits=2, group_size=16, **quant))
    return model


def test_a_dense_checkpoint_is_expected_by_its_own_names(checkpoint):
    reader = SafetensorsReader(checkpoint)
    model = _meta(checkpoint)
    assert any(isinstance(m, HQQLinear) for m in model.modules())
    assert expected_shapes(model) == {name: reader.shape(name) for name in reader.names}


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_a_packed_checkpoint_is_expected_in_bytes(checkpoint, storage):
    model = build_meta(load_hf_config(checkpoint))
    quantize_model(model, QuantConfig(nbits=3, group_size=None), storage_dtype=storage)
    shapes = expected_shapes(model, packed=True)
    name = (
        "model.layers.1.mlp.down_proj"  # [32, 48]: planes of 16 bytes, one for 2 bits and one for 1
    )
    assert shapes[f"{name}.W_q"] == (32, 32)
    assert shapes[f"{name}.scale"] == shapes[f"{name}.zero"] == (32, 1)
    assert f"{name}.weight" not in shapes
    assert shapes["lm_head.weight"] == (96, 32)


def test_adapters_do_not_change_what_is_expected(checkpoint):
    model = _meta(checkpoint)
    before = expected_shapes(model), expected_shapes(model, packed=True)
    model = get_peft_model(model, lora_config(AdapterConfig(r=4), model), low_cpu_mem_usage=True)
    assert any(is_adapter(name) for name, _ in model.named_parameters())
    assert (expected_shapes(model), expected_shapes(model, packed=True)) == before
    assert base_model(nn.Sequential(model)) is model.get_base_model()


def test_biases_are_expected_and_loaded(make_model, tmp_path):
    real = make_model("qwen2", tie_word_embeddings=True)
    real.save_pretrained(tmp_path)
    model = _meta(tmp_path)
    reader = SafetensorsReader(tmp_path, tied_names(model))
    reader.check(expected_shapes(model))
    load_model(model, reader, Communicator(0, 1, torch.device("cpu")))
    bias = model.model.layers[1].self_attn.k_proj.bias
    assert torch.equal(bias, real.model.layers[1].self_attn.k_proj.bias)
    assert not bias.requires_grad


def test_a_tied_head_that_is_quantized_is_read_from_the_embedding(make_model, tmp_path):
    make_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    model = _meta(tmp_path, skip=[])
    reader = SafetensorsReader(tmp_path, tied_names(model))
    assert "lm_head.weight" not in reader.names
    assert expected_shapes(model)["lm_head.weight"] == (96, 32)
    assert reader.check(expected_shapes(model)) == []
    retie_weights(model)
    assert not hasattr(model.lm_head, "weight")


def test_tied_tensors_come_once(make_model):
    model = make_model(tie_word_embeddings=True)
    names = [name for name, *_ in base_tensors(model)]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert len(names) == len(set(names))
