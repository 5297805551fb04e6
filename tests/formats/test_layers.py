"""The stream of a quantized model's tensors, layer by layer."""

from itertools import chain

import pytest
import torch
from exports import layers

from hqqtrain.formats.layers import PackedLayer, by_layer
from hqqtrain.formats.packed import model_tensors, placeholders


@pytest.mark.parametrize("axis", [0, 1])
def test_layers_are_complete_and_dense_tensors_pass(make_trained, axis):
    trained = make_trained("qwen2", axis=axis, nbits=3)
    stream = chain(model_tensors(trained.model), placeholders(trained.settings))
    found = dict(by_layer(stream, trained.settings))
    packed = {name: value for name, value in found.items() if isinstance(value, PackedLayer)}
    assert packed.keys() == trained.settings.modules.keys()
    for name, layer in layers(trained).items():
        assert torch.equal(packed[name].dequantize(), layer.dequantize(torch.float32))
    assert "model.layers.0.self_attn.q_proj.bias" in found
    assert "model.layers.0.self_attn.q_proj.weight" not in found  # the placeholder


@pytest.mark.parametrize("axis", [0, 1])
def test_a_step_is_the_distance_of_two_codes(make_trained, axis):
    trained = make_trained(axis=axis)
    stream = by_layer(model_tensors(trained.model), trained.settings)
    layer = next(value for _, value in stream if isinstance(value, PackedLayer))
    next_codes = (layer.codes + 1) % 4
    other = PackedLayer.from_codes(next_codes, layer.scale, layer.zero, layer.layout)
    wraps = PackedLayer.from_codes(
        (next_codes == 0).to(torch.uint8),
        torch.ones_like(layer.scale),
        torch.zeros_like(layer.zero),
        layer.layout,
    ).dequantize()
    difference = (other.dequantize() - layer.dequantize()).abs()
    torch.testing.assert_close(difference, layer.steps() * (1 + 2 * wraps))


def test_a_layer_without_its_zero_is_a_fault(make_trained):
    trained = make_trained()
    stream = [
        (n, t) for n, t in model_tensors(trained.model) if not n.endswith("0.mlp.up_proj.zero")
    ]
    with pytest.raises(AssertionError, match="up_proj"):
        list(by_layer(stream, trained.settings))
