"""The tokens of a compiled step are those of transformers; a stale step is never used."""

import logging
from functools import partial

import pytest
import torch
from random_models import random_family

from hqqtrain.generation.generator import generate
from hqqtrain.models.source import TINY_FOLDER
from hqqtrain.models.tokenizer import load_tokenizer

PROMPT = "def read(file):"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY_FOLDER)


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch):
    """The step is traced as one graph, but a compiler would take a minute here."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2", "gemma"])
@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_greedy_tokens_are_those_of_transformers(family, penalty, tokenizer, caplog):
    caplog.set_level(logging.INFO)
    model = random_family(family, vocab_size=4096)
    settings = {"max_new_tokens": 12, "temperature": 0, "repetition_penalty": penalty}
    theirs = generate(model, tokenizer, [PROMPT, "import"], **settings)
    ours = generate(model, tokenizer, [PROMPT, "import"], compile=True, **settings)
    assert [one.token_ids for one in ours] == [one.token_ids for one in theirs]
    assert [one.text for one in ours] == [one.text for one in theirs]
    assert "transformers' own loop" not in caplog.text
