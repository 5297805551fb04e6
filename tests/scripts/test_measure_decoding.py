"""The models of scripts/measure_decoding.py are built and run, on a CPU and without compilation."""

import pytest
import torch
from measure_decoding import Sizes, build_model, measure

from hqqtrain.inference.merged_linears import MergedPart
from hqqtrain.nn.hqq_linear import HQQLinear

SMALL = Sizes(hidden_size=64, intermediate_size=128, layers=1, heads=4, key_heads=2, vocabulary=64,
              cache=32, tokens=12)  # fmt: skip


@pytest.mark.parametrize(
    ("word", "quantized", "merged"),
    [("bf16", 0, 0), ("4", 4, 5), ("2:plain", 7, 0), ("2:head", 5, 5), ("4:torchao", 0, 5)],
)
@torch.no_grad()
def test_a_model_is_measured(word, quantized, merged, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda step, **_: step)
    model = build_model(word, SMALL, "cpu")
    assert sum(isinstance(module, HQQLinear) for module in model.modules()) == quantized
    assert sum(isinstance(module, MergedPart) for module in model.modules()) == merged
    assert measure(model, SMALL) > 0
