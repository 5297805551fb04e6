"""Linears whose weight is read by a model's own code are found, and refused if quantized."""

from typing import Any

import pytest
import torch
from architectures import IN_ROWS, PACKED, SMALL, small_config
from torch import nn

from hqqtrain.common.errors import UserError
from hqqtrain.config.quant import QuantConfig
from hqqtrain.loading.model_check import check_called_linears
from hqqtrain.models.build import build_meta
from hqqtrain.models.packing_probe import probe_packing
from hqqtrain.models.weight_access import find_read_linears, without_numbers
from hqqtrain.nn.replace import replace_linears
from hqqtrain.quant.spec import spec_from_config

GEMMA3N: dict[str, Any] = SMALL | {
    "head_dim": 16, "num_kv_shared_layers": 0, "laurel_rank": 16, "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 512, "intermediate_size": [96, 96], "sliding_window": 8,
    "activation_sparsity_pattern": [0.0, 0.0],
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
MIXER = "backbone.layers.*.mixer"
CASES = [
    ("llama", PACKED["llama"], set(), set()),
    ("opt", IN_ROWS["opt"], set(), set()),
    ("mamba", IN_ROWS["mamba"], {f"{MIXER}.dt_proj"},
     {f"{MIXER}.{name}" for name in ("dt_proj", "x_proj", "out_proj")}),
    ("gemma3n_text", GEMMA3N, set(),
     {f"model.layers.*.altup.{kind}_coefs" for kind in ("prediction", "correction")}),
]  # fmt: skip
"""Architecture, settings, and the linears that are read in evaluation, and in training."""


@pytest.mark.parametrize(("name", "settings", "evaluating", "training"), CASES)
def test_the_linears_that_are_read(name, settings, evaluating, training):
    config = small_config(name, settings)
    for trains, expected in ((False, evaluating), (True, training)):
        found = probe_packing(config, build_meta(config), trains=trains).read_linears
        assert {name for name in found if not name.endswith("head")} == expected


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"called": nn.Linear(4, 4), "read": nn.Linear(4, 4)}) for _ in range(2)
        )

    def forward(self, x):
        for layer in self.layers:
            x = layer["called"](x) @ layer["read"].weight
        if self.training:
            raise TypeError("needs labels")
        return x


def test_the_model_is_left_as_it_was():
    model, before = Model().eval(), torch.get_rng_state()
    assert find_read_linears(model, lambda: model(torch.ones(1, 4))) == {"layers.*.read"}
    assert {type(m) for m in model.modules()} == {Model, nn.ModuleList, nn.ModuleDict, nn.Linear}
    assert not any(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), before)


def test_numbers_inside_a_word_stay():
    assert without_numbers("layers.10.mlp.fc1.0") == "layers.*.mlp.fc1.*"


def test_a_quantized_linear_that_is_read_is_refused_with_advice(make_model):
    model = make_model()
    name = "model.layers.1.mlp.up_proj"
    replace_linears(model, {name: spec_from_config(QuantConfig(group_size=16))})
    check_called_linears(model, frozenset(), [])
    check_called_linears(model, frozenset({"model.layers.*.mlp.gate_proj"}), [])
    advice = r"quant\.skip='\[lm_head,\"\*\.up_proj\"\]'"
    with pytest.raises(UserError, match=rf"LlamaForCausalLM reads the weight of {name} .*{advice}"):
        check_called_linears(model, frozenset({"model.layers.*.mlp.up_proj"}), ["lm_head"])
