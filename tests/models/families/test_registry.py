"""The table agrees with the installed transformers, and inspection finds the same names."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from hqqtrain.config.adapter import AdapterConfig
from hqqtrain.config.quant import QuantConfig
from hqqtrain.models.families.registry import FAMILIES, LayerNames, inspect_layer, layer_names
from hqqtrain.models.families.structure import decoder_layers, output_head, text_config
from hqqtrain.nn.lora import lora_config
from hqqtrain.nn.replace import quantize_model

HIDDEN, INNER, HEADS, KEYS = 32, 64, 4, 2
SIZES = {
    "vocab_size": 96, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": HEADS,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXTRA_SIZES = {
    "intermediate_size": INNER, "num_key_value_heads": KEYS, "head_dim": HIDDEN // HEADS,
    "max_position_embeddings": 64, "num_local_experts": 4, "num_experts": 4,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "n_inner": INNER,
    "ffn_dim": INNER, "word_embed_proj_dim": HIDDEN, "rotary_dim": 8,
}  # fmt: skip
VISION_LANGUAGE = {"qwen2_vl_text"}
"""Families whose text models are only a part of a model; see `test_structure`."""
MIXTURES = {"mixtral", "qwen2_moe", "qwen3_moe"}
DECODER_LAYER_PATHS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}


def tiny(kind: str, **options: object) -> nn.Module:
    """Return a model of two layers on meta; each family takes the sizes that it knows."""
    known = AutoConfig.for_model(kind).to_dict()
    sizes = SIZES | {k: v for k, v in EXTRA_SIZES.items() if k in known} | options
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))


def shape(layer: nn.Module, name: str | None) -> tuple[int, int]:
    """Return out_features and in_features of linear `name`."""
    assert name is not None
    linear = layer.get_submodule(name)
    rows, columns = linear.weight.shape
    return (columns, rows) if isinstance(linear, Conv1D) else (rows, columns)


@pytest.mark.parametrize("kind", sorted(FAMILIES.keys() - VISION_LANGUAGE))
def test_a_family_of_the_table(kind):
    """Every linear exists and has the shape of its role; inspection agrees with the table."""
    model = tiny(kind)
    assert text_config(model).model_type == kind
    layers = decoder_layers(model)
    assert layers is model.get_submodule(DECODER_LAYER_PATHS.get(kind, "model.layers"))
    assert output_head(model).weight.shape == (96, HIDDEN)
    layer = layers[1]
    names = layer_names(model, layer)
    assert names == inspect_layer(layer)
    assert shape(layer, names.o) == (HIDDEN, HIDDEN)
    if "q" in names.fused.get(names.q, ()):
        assert names.fused[names.q] == ("q", "k", "v")
        heads = HEADS + 2 * (KEYS if kind == "phi3" else HEADS)
        assert shape(layer, names.q) == (heads * HIDDEN // HEADS, HIDDEN)
    else:
        assert shape(layer, names.q) == (HIDDEN, HIDDEN)
        assert shape(layer, names.k) == shape(layer, names.v) == (HIDDEN * KEYS // HEADS, HIDDEN)
    if kind in MIXTURES:
        assert names.up is names.down is names.gate is None
        experts = layer.get_submodule(names.experts)
        assert {p.dim() for p in experts.parameters()} == {3}
        return
    assert names.experts is None
    fused = len(names.fused.get(names.up, ("up",)))
    inner = shape(layer, names.down)[1]
    assert shape(layer, names.down)[0] == HIDDEN
    assert shape(layer, names.up) == (fused * inner, HIDDEN)
    if names.gate is None:
        assert kind in ("gpt2", "gpt_neox")
    else:
        assert shape(layer, names.gate) == shape(layer, names.up)


def test_the_table_names_what_is_fused():
    fused = {kind: names.fused for kind, names in FAMILIES.items() if names.fused}
    assert fused == {
        "phi3": {"self_attn.qkv_proj": ("q", "k", "v"), "mlp.gate_up_proj": ("gate", "up")},
        "gpt2": {"attn.c_attn": ("q", "k", "v")},
        "gpt_neox": {"attention.query_key_value": ("q", "k", "v")},
    }


def test_layers_of_a_mixture_may_be_dense():
    model = tiny("qwen3_moe", mlp_only_layers=[0])
    dense, sparse = (layer_names(model, layer) for layer in decoder_layers(model))
    assert (dense.gate, dense.up, dense.experts) == ("mlp.gate_proj", "mlp.up_proj", None)
    assert (sparse.gate, sparse.up, sparse.experts) == (None, None, "mlp.experts")


@pytest.mark.parametrize("kind", ["llama", "olmo2"])
def test_quantized_and_adapted_linears_have_the_same_names(kind):
    """Olmo 2 is not in the table; its names are those of Llama."""
    model = tiny(kind)
    quantize_model(model, QuantConfig(group_size=16))
    layer = decoder_layers(model)[0]
    assert layer_names(model, layer) == FAMILIES["llama"]
    peft = get_peft_model(model, lora_config(AdapterConfig(r=2), model), low_cpu_mem_usage=True)
    assert layer_names(peft, layer) == FAMILIES["llama"]
    assert inspect_layer(layer) == FAMILIES["llama"]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("opt", LayerNames(*(f"self_attn.{x}_proj" for x in "qkv"), "self_attn.out_proj", None,
                           "fc1", "fc2")),
        ("gptj", LayerNames(*(f"attn.{x}_proj" for x in "qkv"), "attn.out_proj", None,
                            "mlp.fc_in", "mlp.fc_out")),
        ("falcon", LayerNames(*["self_attention.query_key_value"] * 3, "self_attention.dense",
                              None, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")),
        ("starcoder2", LayerNames(*(f"self_attn.{x}_proj" for x in "qkvo"), None, "mlp.c_fc",
                                  "mlp.c_proj")),
        ("mpt", LayerNames(*["attn.Wqkv"] * 3, "attn.out_proj", None, "ffn.up_proj",
                           "ffn.down_proj")),
    ],
)  # fmt: skip
def test_an_unlisted_family_is_inspected(kind, expected):
    assert kind not in FAMILIES
    model = tiny(kind)
    for layer in decoder_layers(model):
        assert layer_names(model, layer) == expected


def test_a_layer_without_known_names():
    assert inspect_layer(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == LayerNames()


def test_cross_attention_and_experts_do_not_count_as_the_linears_of_a_layer():
    layer = nn.Module()
    layer.cross_attn = nn.ModuleDict({"q_proj": nn.Linear(2, 2)})
    layer.self_attn = nn.ModuleDict({"q_proj": nn.Linear(2, 2)})
    layer.mlp = nn.Module()
    layer.mlp.experts = nn.ModuleList([nn.ModuleDict({"up_proj": nn.Linear(2, 2)})])
    assert inspect_layer(layer) == LayerNames(q="self_attn.q_proj", experts="mlp.experts")
