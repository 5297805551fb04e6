"""FLOPs per token of a model that is small enough to count by hand."""

from torch import nn

from hqqtrain.config.groups import QuantConfig
from hqqtrain.nn.replace import quantize_model
from hqqtrain.train.mfu import flops_per_token, mfu_per_token_rate, peak_flops


def test_frozen_layers_take_four_flops_and_trained_ones_six():
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16))
    quantize_model(model, QuantConfig(group_size=32, skip=["1"]))
    assert flops_per_token(model) == 4 * 64 * 32 + 6 * 32 * 16
    model[1].requires_grad_(False)
    assert flops_per_token(model) == 4 * (64 * 32 + 32 * 16)


def test_devices_are_found_by_part_of_their_name():
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("cpu") is None


def test_utilization_is_a_share_of_all_devices():
    model = nn.Linear(1000, 1000, bias=False)
    assert mfu_per_token_rate(model, "NVIDIA H200", 2) == 6e6 / (2 * 989e12)
    assert mfu_per_token_rate(model, "cpu", 1) is None
