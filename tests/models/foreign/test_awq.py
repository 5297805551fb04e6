"""Checkpoints of AWQ's tools, packed by plain Python."""

import pytest
import torch
from foreign_models import dequantized, open_folder
from packers import awq_tensors, random_weight, save_layers

from hqqtrain.common.errors import UserError

CONFIG = {"quant_method": "awq", "bits": 4, "version": "gemm"}


@pytest.mark.parametrize(("out", "groups"), [(64, 2), (24, 1), (8, 4)])
def test_weights_are_equal_to_the_bit(tmp_path, out, groups):
    weight = random_weight(4, out=out, groups=groups)
    reader = open_folder(save_layers(tmp_path, {"m": awq_tensors(weight)}, CONFIG))
    assert torch.equal(dequantized(reader, "m", torch.float16), weight.dequantized)
    assert reader.layers["m"].spec.group_size == 64 // groups


@pytest.mark.parametrize("config", [{"version": "gemv"}, {"bits": 8}])
def test_other_packings(tmp_path, config):
    layers = {"m": awq_tensors(random_weight(4))}
    with pytest.raises(UserError, match="cannot be taken over; only gemm with 4 bits is"):
        open_folder(save_layers(tmp_path, layers, CONFIG | config))


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        ("qweight", torch.zeros(64, 7, dtype=torch.int32), r"qweight is \[64, 7\] int32, expected"),
        ("qweight", torch.zeros(63, 8, dtype=torch.int32), r"m \[64, 63\] has 2 groups"),
        ("qzeros", torch.zeros(2, 9, dtype=torch.int32), r"qzeros is \[2, 9\] int32, expected"),
        ("scales", torch.ones(2, 61), r"m \[61, 64\] has 2 groups, or columns that do not fill"),
    ],
)
def test_a_damaged_layer(tmp_path, key, tensor, message):
    layer = awq_tensors(random_weight(4)) | {key: tensor}
    with pytest.raises(UserError, match=message):
        open_folder(save_layers(tmp_path, {"m": layer}, CONFIG))
