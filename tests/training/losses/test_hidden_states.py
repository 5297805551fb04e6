"""The hidden states that a model passes to its head, and the heads whose output it changes."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Gemma2Config, Gemma2ForCausalLM

from hqqtrain.data.sequences import IGNORE_INDEX
from hqqtrain.models.causal_lm import next_token_outputs
from hqqtrain.models.families.structure import output_head
from hqqtrain.training.losses.hidden_states import (
    next_token_hidden_states,
    returns_head_output,
)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(0, 96, (2, 9))
    labels = ids.clone()
    labels[0, :3] = IGNORE_INDEX
    return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(9).expand(2, 9)}


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("adapts", [False, True])
def test_the_head_makes_the_logits_of_them(make_model, batch, kind: str, adapts: bool):
    model = make_model(kind)
    if adapts:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    head = output_head(model)
    hidden, labels = next_token_hidden_states(model, batch)
    assert hidden.shape == (2 * 8, 32)
    logits, expected = next_token_outputs(model, batch)
    assert torch.equal(head(hidden), logits)
    assert torch.equal(labels, expected)
    assert output_head(model) is head  # it is back in its place
    assert returns_head_output(model, torch.device("cpu"))


def test_the_head_returns_to_its_place_after_an_error(make_model, batch, monkeypatch):
    model = make_model()
    head = output_head(model)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.model, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        next_token_hidden_states(model, batch)
    assert output_head(model) is head


def test_a_cap_on_the_logits_is_detected():
    config = Gemma2Config(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, final_logit_softcapping=30.0,
    )  # fmt: skip
    capped = Gemma2ForCausalLM(config).eval()
    assert not returns_head_output(capped, torch.device("cpu"))
    config.final_logit_softcapping = None
    assert returns_head_output(Gemma2ForCausalLM(config).eval(), torch.device("cpu"))


def test_gradients_flow_through_hidden_states_and_head(make_model, batch):
    model = make_model()
    hidden, _ = next_token_hidden_states(model, batch)
    output_head(model)(hidden).sum().backward()
    assert all(param.grad is not None for param in model.parameters())
