"""The formats that can be read have the same names where torch is not imported."""

import itertools
import json

import pytest
import torch
from safetensors.torch import save_file

from hqqtrain.common.errors import UserError
from hqqtrain.common.packed_folders import FOREIGN_METHODS
from hqqtrain.models.foreign.registry import FORMATS, open_foreign
from hqqtrain.models.source import ModelSource


def test_the_names_are_the_same():
    assert (*FORMATS, "gguf") == FOREIGN_METHODS


@pytest.mark.parametrize("method", FORMATS)
def test_values_of_other_types(tmp_path, method):
    keys = ("bits", "checkpoint_format", "format", "act_bits", "version", "packing_format",
            "config_groups", "sparsity_config")  # fmt: skip
    save_file({"a.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    for key, value in itertools.product(keys, ["x", [4], {"a": 1}, None, -3, 0.5]):
        config = {"quantization_config": {"quant_method": method, key: value}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=r"cannot be taken over|damaged|no layer"):
            open_foreign(ModelSource("m", tmp_path, "quantized", foreign=method))


@pytest.mark.parametrize("method", FORMATS)
def test_a_checkpoint_without_quantized_layers(tmp_path, method):
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"bits": 4}}))
    save_file({"a.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=rf"contains no layer that {method}|config"):
        open_foreign(ModelSource("m", tmp_path, "quantized", foreign=method))
