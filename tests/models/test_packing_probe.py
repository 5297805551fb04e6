"""The probe says of each architecture whether packed texts see each other, and is right."""

import random

import pytest
import torch
from architectures import ENCODERS, IN_ROWS, PACKED, SMALL, small_config, small_model

from hqqtrain.common.errors import UserError
from hqqtrain.models import packing_probe
from hqqtrain.models.build import build_meta, load_hf_config
from hqqtrain.models.packing_probe import PackingProbe, probe_packing
from hqqtrain.models.source import shipped_folder


def probe(name: str, settings: dict) -> PackingProbe:
    config = small_config(name, settings)
    return probe_packing(config, build_meta(config))


@torch.no_grad()
def change_of_the_second_text(name: str, settings: dict) -> float:
    """Return by how much the logits of a packed text change with the text before it."""
    model, generator = small_model(small_config(name, settings)), torch.Generator().manual_seed(1)
    first, other, second = torch.randint(2, 500, (3, 20), generator=generator)
    positions = torch.arange(20).repeat(2)[None]
    packed = [
        model(input_ids=torch.cat([text, second])[None], position_ids=positions, use_cache=False)
        for text in (first, other)
    ]
    return float((packed[0].logits - packed[1].logits)[0, 20:].abs().max())


@pytest.mark.parametrize("name", PACKED)
def test_models_that_keep_packed_texts_apart(name):
    assert probe(name, PACKED[name]) == PackingProbe(True)
    assert change_of_the_second_text(name, PACKED[name]) < 1e-3


@pytest.mark.parametrize("name", IN_ROWS)
def test_models_that_let_packed_texts_see_each_other(name):
    result = probe(name, IN_ROWS[name])
    assert not result.is_isolated
    assert "could not be tested" not in result.reason
    try:
        assert change_of_the_second_text(name, IN_ROWS[name]) > 0.1
    except (TypeError, IndexError):
        assert "takes no position_ids" in result.reason or name == "roberta"


@pytest.mark.parametrize("name", ENCODERS)
def test_models_that_are_not_causal_are_refused(name):
    with pytest.raises(UserError, match=rf"model_type={name}: .*is not causal.*is_decoder=true"):
        probe(name, ENCODERS[name])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_without_finite_logits_is_not_called_an_encoder(monkeypatch, value):
    logits = torch.full((11, 5), value)
    monkeypatch.setattr(packing_probe._Texts, "logits", lambda *_, **__: logits)
    with pytest.raises(UserError, match=r"model_type=llama: .*NaN or infinite logits"):
        probe("llama", SMALL)


def test_a_model_that_needs_more_than_tokens_is_refused():
    with pytest.raises(
        UserError, match=r"model_type=xmod: .*from tokens alone \(ValueError: Input l"
    ):
        probe("xmod", ENCODERS["bert"] | {"is_decoder": True})


def test_a_model_without_a_small_copy_does_not_pack(monkeypatch):
    monkeypatch.setattr("hqqtrain.models.small_copy._MAX_PARAMETERS", 0)
    result = probe("llama", SMALL)
    assert not result.is_isolated
    assert "could not be tested" in result.reason


def test_a_copy_that_cannot_be_called_is_no_reason_to_refuse_a_model(monkeypatch):
    """The whole model can be called, so only the widths of the copy are at fault."""

    def fail(*_, **__):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("hqqtrain.models.packing_probe._Texts.logits", fail)
    result = probe("llama", SMALL)
    assert result == PackingProbe(False, "could not be tested (RuntimeError: shapes do not match)")


def test_a_70b_model_is_probed_without_its_weights_and_without_using_random_numbers():
    config = load_hf_config(shipped_folder("meta-llama/Meta-Llama-3-70B"))
    states = torch.get_rng_state(), random.getstate()
    assert probe_packing(config, build_meta(config)).is_isolated
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_the_configuration_is_not_changed():
    config = small_config("gemma3_text", PACKED["gemma3_text"])
    before = config.to_json_string()
    probe_packing(config, build_meta(config))
    assert config.to_json_string() == before
