"""AutoRound's own format packs as GPTQ or AWQ."""

import pytest
import torch
from foreign_models import dequantized, open_folder
from packers import awq_tensors, gptq_tensors, random_weight, save_layers

from hqqtrain.common.errors import UserError

CONFIG = {"quant_method": "auto-round", "bits": 4, "data_type": "int", "act_bits": None}


@pytest.mark.parametrize(
    ("packing", "version"),
    [("auto_round", 2), ("auto_round:auto_gptq", 1), ("auto_round:gptqmodel", 2), ("x:awq", 0)],
)
def test_weights_are_equal_to_the_bit(tmp_path, packing, version):
    weight = random_weight(4)
    layer = gptq_tensors(weight, 4, version=version) if version else awq_tensors(weight)
    folder = save_layers(tmp_path, {"m": layer}, CONFIG | {"packing_format": packing})
    assert torch.equal(dequantized(open_folder(folder), "m", torch.float16), weight.dequantized)


@pytest.mark.parametrize(
    "config", [{"data_type": "mx_fp"}, {"act_bits": 8}, {"rotation_config": {"x": 1}}]
)
def test_what_cannot_be_taken_over(tmp_path, config):
    layers = {"m": gptq_tensors(random_weight(4), 4)}
    with pytest.raises(UserError, match="cannot be taken over; only"):
        open_folder(save_layers(tmp_path, layers, CONFIG | config))
