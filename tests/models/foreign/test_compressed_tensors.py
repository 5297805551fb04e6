"""Checkpoints of compressed-tensors, packed by plain Python."""

import pytest
import torch
from foreign_models import dequantized, open_folder
from packers import compressed_tensors, random_weight, save_layers

from hqqtrain.common.errors import UserError

CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"}}},
}


@pytest.mark.parametrize("zeros", ["none", "packed", "plain"])
@pytest.mark.parametrize(("nbits", "groups"), [(8, 1), (4, 2), (3, 4), (2, 2)])
def test_weights_are_equal_to_the_bit(tmp_path, nbits, groups, zeros):
    zero = 1 << nbits - 1 if zeros == "none" else None
    weight = random_weight(nbits, out=72, groups=groups, zero=zero)
    layer = compressed_tensors(weight, nbits, zeros)
    if zeros == "plain":
        layer["weight_g_idx"] = torch.arange(64) // (64 // groups)
    reader = open_folder(save_layers(tmp_path, {"m": layer}, CONFIG))
    assert torch.equal(dequantized(reader, "m", torch.float16), weight.dequantized)
    assert reader.names == ["m.W_q", "m.scale", "m.zero"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"format": "marlin-24"}, "format=marlin-24 cannot be taken over"),
        ({"format": "float-quantized"}, "format=float-quantized"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config.format=sparse"),
        ({"transform_config": {"config_groups": {}}}, "transform_config"),
        ({"config_groups": {"g": {"format": "nvfp4-pack-quantized"}}}, "format=nvfp4"),
        ({"config_groups": {"g": {"weights": {"type": "float"}}}}, "weights.type=float"),
        ({"config_groups": {"g": {"input_activations": {"num_bits": 8}}}}, "input_activations"),
    ],
)
def test_what_cannot_be_taken_over(tmp_path, config, message):
    layers = {"m": compressed_tensors(random_weight(4), 4, "packed")}
    with pytest.raises(UserError, match=message):
        open_folder(save_layers(tmp_path, layers, CONFIG | config))


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        ("weight_shape", torch.tensor([64]), r"m\.weight_shape is missing or no pair"),
        ("weight_shape", torch.tensor([64, 1 << 60]), r"has 8 words a row"),
        ("weight_packed", torch.zeros(64, 7, dtype=torch.int32), r"has 7 words a row for 64 codes"),
        ("weight_scale", torch.ones(64, 3), r"m has 3 groups for 64 columns"),
        ("weight_scale", torch.ones(1), r"m\.weight_scale \[1\] is no matrix"),
        ("weight_zero_point", torch.ones(64, 2), r"weight_zero_point is \[64, 2\] float32"),
        ("weight_g_idx", torch.arange(64) % 2, r"act-order .* of m"),
    ],
)
def test_a_damaged_layer(tmp_path, key, tensor, message):
    layer = compressed_tensors(random_weight(4), 4, "packed") | {key: tensor}
    with pytest.raises(UserError, match=message):
        open_folder(save_layers(tmp_path, {"m": layer}, CONFIG))
