"""Layer by layer a model gives its own logits, whatever passes from layer to layer."""

import pytest
import torch
from architectures import IN_ROWS, PACKED, small_config
from random_models import random_family
from torch import nn
from transformers import PreTrainedModel

from hqqtrain.models import layerwise as module
from hqqtrain.models.build import build_meta
from hqqtrain.models.layerwise import LayerCall, LayerwiseError, LayerwiseModel, probe_layerwise

FAMILIES = (
    "llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "opt", "falcon", "bloom",
    "gpt_neox", "mistral", "olmo2",
)  # fmt: skip


def tokens() -> torch.Tensor:
    return torch.randint(3, 90, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", FAMILIES)
def test_logits_are_those_of_the_model(kind: str) -> None:
    model, inputs = random_family(kind), {"input_ids": tokens()}
    layerwise = LayerwiseModel(model)
    hidden, calls = layerwise.start(inputs)
    assert len(calls) == len(layerwise.layers) == len(layerwise.names)
    for layer, call in zip(layerwise.layers, calls, strict=True):
        hidden = layerwise.run_layer(layer, hidden, call)
    with torch.no_grad():
        assert torch.equal(layerwise.finish(inputs, hidden), model(**inputs).logits)
    assert all("forward" not in vars(layer) for layer in layerwise.layers)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "bloom"])
def test_the_probe_lets_these_pass(kind: str) -> None:
    model = random_family(kind)
    assert probe_layerwise(model.config, model) == ""


@pytest.mark.parametrize("name", PACKED | IN_ROWS)
def test_layers_may_return_tuples_of_any_length(name: str) -> None:
    """The layers of Bamba return two outputs, and those of RWKV three."""
    config = small_config(name, (PACKED | IN_ROWS)[name])
    assert probe_layerwise(config, build_meta(config)) == ""


def test_names_are_those_of_the_checkpoint() -> None:
    assert LayerwiseModel(random_family("llama")).names == ["model.layers.0", "model.layers.1"]


def test_start_needs_no_weights_of_the_layers() -> None:
    model = random_family("qwen3")
    expected, _ = LayerwiseModel(model).start({"input_ids": tokens()})
    for layer in model.model.layers:
        layer.to_empty(device="meta")
    assert torch.equal(LayerwiseModel(model).start({"input_ids": tokens()})[0], expected)


def changed(model: PreTrainedModel, forward) -> PreTrainedModel:
    """Return `model` with another loop over its decoder layers."""
    model.model.forward = forward.__get__(model.model)
    return model


class Output(nn.Module):
    last_hidden_state: torch.Tensor


def test_a_model_that_changes_hidden_states_between_layers_is_refused() -> None:
    def forward(self, input_ids, **_):
        hidden = self.embed_tokens(input_ids)
        positions = self.rotary_emb(hidden, torch.arange(input_ids.shape[1])[None])
        for layer in self.layers:
            hidden = layer(hidden * 1.5, position_embeddings=positions)
        return hidden

    model = changed(random_family("llama"), forward)
    with pytest.raises(LayerwiseError, match="changes the hidden states between"):
        LayerwiseModel(model).start({"input_ids": tokens()})


def test_a_model_that_repeats_a_layer_is_refused() -> None:
    def forward(self, input_ids, **_):
        hidden = self.embed_tokens(input_ids)
        positions = self.rotary_emb(hidden, torch.arange(input_ids.shape[1])[None])
        for layer in (self.layers[0], self.layers[0], self.layers[1]):
            hidden = layer(hidden, position_embeddings=positions)
        return hidden

    model = changed(random_family("llama"), forward)
    with pytest.raises(LayerwiseError, match="in another order, or several times"):
        LayerwiseModel(model).start({"input_ids": tokens()})


def test_the_probe_compares_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    real = LayerwiseModel.run_layer

    def run_layer(self, layer: nn.Module, hidden: torch.Tensor, call: LayerCall) -> torch.Tensor:
        return real(self, layer, hidden, call) * 1.01  # as if a model did more between its layers

    monkeypatch.setattr(module.LayerwiseModel, "run_layer", run_layer)
    model = random_family("llama")
    assert "computes other logits" in probe_layerwise(model.config, model)
