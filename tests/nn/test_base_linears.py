"""Dense layers that are adapted like quantized ones, and their selection."""

import torch
from torch import nn

from hqqtrain.config.quant import QuantConfig
from hqqtrain.nn.base_linears import DenseLinear, base_linears, linear_shapes
from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain.nn.replace import quantize_model


def test_a_dense_layer_shares_the_parameters_of_the_linear_that_it_replaces():
    linear = nn.Linear(3, 5)
    layer = DenseLinear.from_linear(linear)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    x = torch.randn(2, 3)
    assert torch.equal(layer(x), linear(x))
    assert DenseLinear.from_linear(nn.Linear(3, 5, bias=False)).bias is None


def test_both_kinds_of_layers_are_found_and_others_are_not():
    def model() -> nn.Sequential:
        return nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 8))

    settings = {"group_size": 16, "skip": ["1"]}
    dense, quantized = model(), model()
    weights = [layer.weight for layer in dense]
    report = quantize_model(dense, QuantConfig(nbits=None, **settings))
    quantize_model(quantized, QuantConfig(nbits=4, **settings))
    assert linear_shapes(dense) == linear_shapes(quantized) == {"0": (32, 16), "2": (8, 16)}
    assert {type(layer) for layer in base_linears(dense).values()} == {DenseLinear}
    assert {type(layer) for layer in base_linears(quantized).values()} == {HQQLinear}
    assert all(layer.weight is weight for layer, weight in zip(dense, weights, strict=True))
    assert (report.quantized, report.dense, report.skipped) == ({}, ["0", "2"], ["1"])
    assert report.share == 0


def test_settings_that_fit_no_layer_do_not_matter_without_quantization(caplog):
    model = nn.Sequential(nn.Linear(10, 10))
    quantize_model(model, QuantConfig(nbits=None, group_size=64, overrides={"0": {"nbits": 2}}))
    assert type(model[0]) is DenseLinear
    assert not caplog.records
