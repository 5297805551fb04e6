"""The tokens of a compiled step are those of transformers; a stale step is never used."""

import gc
import logging
import weakref
from functools import partial

import pytest
import torch
from random_models import random_family
from transformers import GenerationConfig

from hqqtrain.common.errors import UserError
from hqqtrain.compat import supports_static_cache
from hqqtrain.generation import static_decoder as decoders
from hqqtrain.generation.generator import TextGenerator, generate
from hqqtrain.generation.settings import Sampling
from hqqtrain.generation.static_decoder import StaticDecoder, static_decoder
from hqqtrain.models.source import TINY_FOLDER
from hqqtrain.models.tokenizer import load_tokenizer

PROMPT = "def read(file):"
ELSEWHERE = "transformers' own loop generates"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY_FOLDER)


@pytest.fixture
def make_model(make_model):
    """Return the factory of random models with the vocabulary of the bundled tokenizer."""
    return partial(make_model, vocab_size=4096, max_position_embeddings=128)


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch):
    """The step is traced as one graph, but a compiler would take a minute here."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO)
    return caplog


@pytest.mark.parametrize(
    ("family", "penalty"), [("llama", 1.4), ("qwen3", 1.0), ("olmo2", 1.0), ("gemma", 1.0)]
)
def test_greedy_tokens_are_those_of_transformers(family, penalty, tokenizer, log):
    model = random_family(family, vocab_size=4096)
    settings = {"max_new_tokens": 12, "temperature": 0, "repetition_penalty": penalty}
    theirs = generate(model, tokenizer, [PROMPT, "import"], **settings)
    ours = generate(model, tokenizer, [PROMPT, "import"], compile=True, **settings)
    assert [one.token_ids for one in ours] == [one.token_ids for one in theirs]
    assert [one.text for one in ours] == [one.text for one in theirs]
    assert ELSEWHERE not in log.text


def test_a_text_ends_where_transformers_ends_it(make_trained, tokenizer):
    model = make_trained("llama", nbits=4).model
    (whole,) = generate(model, tokenizer, PROMPT, max_new_tokens=10)
    model.base_model.model.generation_config.eos_token_id = whole.token_ids[4]
    (theirs,) = generate(model, tokenizer, PROMPT, max_new_tokens=10)
    (ours,) = generate(model, tokenizer, PROMPT, max_new_tokens=10, compile=True)
    assert ours.token_ids == theirs.token_ids == whole.token_ids[: len(ours.token_ids)]
    assert len(ours.token_ids) <= 5
    assert ours.is_complete
    (one,) = generate(model, tokenizer, PROMPT, max_new_tokens=1, compile=True)
    assert one.token_ids == whole.token_ids[:1]


def test_a_step_is_compiled_once_for_a_model_and_its_settings(make_trained, tokenizer, monkeypatch):
    """Another text, another length and the end of a turn are no reasons to compile again."""
    made = []
    monkeypatch.setattr(
        decoders, "StaticDecoder", lambda *given: made.append(given) or StaticDecoder(*given)
    )
    model = make_trained("llama", nbits=4).model
    compiled = partial(generate, model, tokenizer, max_new_tokens=3, compile=True)
    first = compiled(PROMPT)
    compiled("import"), compiled([PROMPT, "x"], max_new_tokens=5)
    assert compiled(PROMPT)[0].token_ids == first[0].token_ids
    assert len(made) == 1
    with model.disable_adapter():
        base, expected = compiled(PROMPT), generate(model, tokenizer, PROMPT, max_new_tokens=3)
    assert base[0].token_ids == expected[0].token_ids
    assert len(made) == 2, "a step with the adapter must not be used without it"
    compiled(PROMPT, temperature=0.5)
    assert len(made) == 3
    reference = weakref.ref(model.base_model.model)
    del model, compiled
    made.clear()
    gc.collect()
    torch._dynamo.reset()
    assert reference() is None, "the decoder keeps the model"


def test_one_text_is_generated_at_a_time(make_trained, tokenizer):
    model = make_trained("llama", nbits=4).model
    compiled = partial(generate, model, tokenizer, PROMPT, max_new_tokens=3, compile=True)
    first = compiled()
    with pytest.raises(UserError, match="generates a text already"):
        compiled(on_text=lambda _: compiled())
    assert compiled()[0].token_ids == first[0].token_ids


def test_a_seed_repeats_a_text_whether_or_not_the_step_is_compiled_for_it(make_trained, tokenizer):
    model = make_trained("llama", nbits=4).model
    sample = partial(
        generate, model, tokenizer, PROMPT, max_new_tokens=8, temperature=1.5, compile=True
    )
    first, second, other = sample(seed=1), sample(seed=1), sample(seed=2)
    assert first[0].token_ids == second[0].token_ids != other[0].token_ids


def test_other_settings_are_left_to_transformers(make_trained, log):
    config = GenerationConfig(do_sample=True, typical_p=0.5)
    assert static_decoder(make_trained("llama", nbits=4).model, config, 64) is None
    assert f"{ELSEWHERE}, which is slower: typical_p=0.5" in log.text


def test_a_sliding_window_is_left_to_transformers(tokenizer, log):
    model = random_family("mistral", vocab_size=4096, sliding_window=8)
    assert supports_static_cache(model)
    generator = TextGenerator(
        model, tokenizer, sampling=Sampling(temperature=0), max_new_tokens=6, compile=True
    )
    model._compiled_call = model.__call__  # transformers compiles in its own way
    expected = generate(model, tokenizer, PROMPT, temperature=0, max_new_tokens=6)
    for _ in range(2):
        assert generator.generate(PROMPT).token_ids == expected[0].token_ids
    assert log.text.count(f"{ELSEWHERE}, which is slower: its cache is transformers' Static") == 1


def test_a_compiler_that_fails_is_no_reason_to_stop(make_trained, log, monkeypatch):
    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(torch, "compile", failing)
    config = GenerationConfig(do_sample=False)
    assert static_decoder(make_trained("llama", nbits=4).model, config, 64) is None
    assert "slower: no compiler here\n" in log.text


@pytest.mark.gpu
@pytest.mark.parametrize("nbits", [4, 2])
def test_a_cuda_graph_generates_what_transformers_does(make_trained, tokenizer, monkeypatch, nbits):
    monkeypatch.undo()
    model = make_trained("llama", nbits=nbits).model.cuda()
    settings = {"max_new_tokens": 40, "temperature": 0}
    theirs = generate(model, tokenizer, [PROMPT, "import"], compile=False, **settings)
    for _ in range(2):
        ours = generate(model, tokenizer, [PROMPT, "import"], **settings)
        assert [one.token_ids for one in ours] == [one.token_ids for one in theirs]
    sample = partial(generate, model, tokenizer, PROMPT, max_new_tokens=20, temperature=2.0)
    texts = [sample(seed=seed)[0].token_ids for seed in (1, 2, 1, None, None)]
    assert texts[0] == texts[2] != texts[1]
    assert texts[3] != texts[4]
