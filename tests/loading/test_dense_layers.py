"""The dense model of a calibration has the tensors of the model that is loaded, while needed."""

import pytest
import torch
from random_models import random_family
from torch import nn

from hqqtrain.config.quant import QuantConfig
from hqqtrain.distributed.comm import SINGLE_PROCESS
from hqqtrain.loading.dense_layers import DenseLayers
from hqqtrain.loading.load import tensors_by_name
from hqqtrain.models.build import build_meta
from hqqtrain.nn.replace import quantize_model

TOKENS = torch.arange(3, 25).view(2, 11)


def dense_layers(kind: str) -> tuple[nn.Module, DenseLayers]:
    """Return a model, and an empty dense one beside a copy with quantized linears."""
    truth, loaded = random_family(kind), random_family(kind)
    quantize_model(loaded, QuantConfig(group_size=8, solver="rtn", skip=["lm_head"]))
    quantized, dense = tensors_by_name(loaded)
    empty = build_meta(truth.config, torch.float32)
    return truth, DenseLayers(empty, dense, quantized, SINGLE_PROCESS)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3_text", "gpt_neox"])
def test_its_layers_compute_what_those_of_the_model_do(kind: str) -> None:
    truth, layers = dense_layers(kind)
    layers.fill_outside()
    hidden, calls = layers.layerwise.start({"input_ids": TOKENS})
    layers.release_outside()
    expected = truth(TOKENS, output_hidden_states=True).hidden_states
    assert torch.equal(hidden, expected[0])
    for index, linears in enumerate(layers.quantized_by_layer()):
        assert linears
        layers.fill_layer(index)
        for name in linears:
            layers.gather_weight(name, truth.get_submodule(name).weight)
        hidden = layers.layerwise.run_layer(layers.layerwise.layers[index], hidden, calls[index])
        if index + 1 < len(calls):  # the last one is normalized before it is returned
            assert torch.equal(hidden, expected[index + 1])
        layers.release_layer(index)
        parameters = layers.layerwise.layers[index].parameters()
        assert all(parameter.is_meta for parameter in parameters)


def test_nothing_outside_of_the_layers_stays() -> None:
    _, layers = dense_layers("llama")
    layers.fill_outside()
    assert not layers._model.model.embed_tokens.weight.is_meta
    assert layers._model.model.layers[0].mlp.up_proj.weight.is_meta
    layers.release_outside()
    assert all(parameter.is_meta for parameter in layers._model.parameters())
