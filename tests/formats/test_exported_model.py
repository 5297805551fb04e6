"""The model of an export computes with the exported weights, and shares all others."""

import pytest
import torch
from exports import TOKENS, logits_of_export

from hqqtrain.formats.targets.humming import HummingFormat


@pytest.mark.parametrize("name", ["humming", "hqq", "packed"])
def test_a_format_that_keeps_the_weights_has_the_same_logits(make_trained, tmp_path, name):
    trained = make_trained("qwen2")
    logits = logits_of_export(trained, name, tmp_path / "out")
    torch.testing.assert_close(logits, trained.model(TOKENS).logits)


def test_it_computes_with_what_was_written(make_trained, tmp_path, monkeypatch):
    encode = HummingFormat.encode

    def wrong(self, layer, dtype):
        tensors = encode(self, layer, dtype)
        return tensors | {"weight_scale": tensors["weight_scale"] * 1.5}

    monkeypatch.setattr(HummingFormat, "encode", wrong)
    trained = make_trained()
    logits = logits_of_export(trained, "humming", tmp_path / "out")
    assert not torch.allclose(logits, trained.model(TOKENS).logits, atol=1e-2)


def test_a_merged_adapter_is_not_added_twice(make_trained, tmp_path):
    trained = make_trained("qwen2")
    merged = trained.adapter.modules
    logits = logits_of_export(trained, "dense", tmp_path / "out", merged, adapter_form="merge")
    torch.testing.assert_close(logits, trained.model(TOKENS).logits)
