"""Tokens are chosen with the probabilities of transformers, and penalized as there."""

import pytest
import torch
from transformers import GenerationConfig, RepetitionPenaltyLogitsProcessor

from hqqtrain.generation.token_choice import TokenChoice, choice_settings, unsupported_setting

CPU = torch.device("cpu")


def test_tokens_are_drawn_with_their_probabilities():
    config = GenerationConfig(do_sample=True, temperature=0.5, top_k=3, top_p=0.9, min_p=0.01)
    choice = TokenChoice(config, 100, CPU)
    logits = torch.full((1, 100), -5.0)
    logits[0, :5] = torch.tensor([1.0, 0.8, 0.6, 0.55, -1.0])
    torch.manual_seed(0)
    drawn = torch.tensor([choice(logits).item() for _ in range(3000)])
    shares = torch.bincount(drawn, minlength=5) / len(drawn)
    expected = torch.softmax(logits[0, :3] / 0.5, -1)  # all three are within top_p
    assert shares[3:].sum() == 0
    assert torch.allclose(shares[:3], expected, atol=0.04)


@pytest.mark.parametrize(("top_k", "most"), [(None, 50), (0, 100), (7, 7)])
def test_the_number_of_tokens_is_that_of_transformers(top_k, most):
    choice = TokenChoice(GenerationConfig(do_sample=True, top_k=top_k), 100, CPU)
    torch.manual_seed(0)
    logits = torch.linspace(0, 0.1, 100)[None]
    assert len({choice(logits).item() for _ in range(2000)}) == most


def test_tokens_of_the_text_are_penalized():
    config = GenerationConfig(do_sample=False, repetition_penalty=1.5)
    theirs, choice = RepetitionPenaltyLogitsProcessor(1.5), TokenChoice(config, 40, CPU)
    torch.manual_seed(0)
    text = torch.randint(0, 40, (1, 6))
    choice.begin(text)
    for _ in range(30):
        logits = torch.randn(1, 40)
        token = choice(logits)
        assert token.item() == theirs(text, logits.clone()).argmax().item()
        text = torch.cat([text, token], 1)
    choice.begin(text[:, :1])
    assert choice._seen.sum() == 1, "a new text forgets the one before"


@pytest.mark.parametrize(
    ("key", "value"), [("no_repeat_ngram_size", 2), ("suppress_tokens", [5]), ("typical_p", 0.5)]
)
def test_settings_of_transformers_alone(key, value):
    assert unsupported_setting(GenerationConfig()) is None
    assert unsupported_setting(GenerationConfig(no_repeat_ngram_size=0, typical_p=1.0)) is None
    assert unsupported_setting(GenerationConfig(**{key: value})) == f"{key}={value}"


def test_lengths_are_no_part_of_a_choice():
    first = choice_settings(GenerationConfig(top_p=0.5, max_new_tokens=5))
    assert first == choice_settings(GenerationConfig(top_p=0.5, max_new_tokens=9))
    assert first != choice_settings(GenerationConfig(top_p=0.6))
