"""Generated tokens are those of stock transformers; a seed repeats; settings are restored."""

import copy
from functools import partial

import pytest
import torch
from peft import PeftModel
from random_models import random_family
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

import hqqtrain
from hqqtrain.common.errors import UserError
from hqqtrain.data.chat.library import chat_template_source
from hqqtrain.generation.generator import TextGenerator, generate, seeded
from hqqtrain.models.fqn import base_model
from hqqtrain.models.source import TINY_FOLDER
from hqqtrain.models.tokenizer import load_tokenizer
from hqqtrain.nn.hqq_linear import HQQLinear

PROMPT = "def read(file):"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY_FOLDER)


@pytest.fixture
def trained(make_trained) -> PeftModel:
    """Return a quantized random model with an adapter, whose vocabulary is the tokenizer's."""
    return make_trained("llama", nbits=4).model


@pytest.fixture
def make_model(make_model):
    """Return the factory of random models with the vocabulary of the bundled tokenizer."""
    return partial(make_model, vocab_size=4096, max_position_embeddings=128)


def _dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """Return a stock model with the weights of a quantized one."""
    dense = copy.deepcopy(model)
    for name, module in list(dense.named_modules()):
        if isinstance(module, HQQLinear):
            linear = nn.Linear(module.in_features, module.out_features, bias=False)
            linear.weight.data = module.dequantize()
            parent, _, child = name.rpartition(".")
            setattr(dense.get_submodule(parent), child, linear)
    return dense


def test_greedy_tokens_are_those_of_stock_transformers_on_dequantized_weights(trained, tokenizer):
    base = trained.unload()
    (ours,) = hqqtrain.generate(base, tokenizer, PROMPT, max_new_tokens=30)
    stock, inputs = _dequantized(base), tokenizer(PROMPT, return_tensors="pt")
    config = GenerationConfig(do_sample=False, max_new_tokens=30, pad_token_id=0)
    theirs = stock.generate(inputs["input_ids"], generation_config=config)[0].tolist()
    assert inputs["input_ids"][0].tolist() + ours.token_ids == theirs
    assert ours.text == tokenizer.decode(ours.token_ids, skip_special_tokens=True)
    assert (ours.prompt_tokens, ours.is_complete) == (inputs["input_ids"].shape[1], False)


def test_the_adapter_counts_and_the_model_is_left_as_it_was(trained, tokenizer):
    trained.train()
    settings = base_model(trained).generation_config
    (adapted,) = generate(trained, tokenizer, PROMPT, max_new_tokens=8)
    with trained.disable_adapter():
        (alone,) = generate(trained, tokenizer, PROMPT, max_new_tokens=8)
    assert adapted.token_ids != alone.token_ids
    assert trained.training
    assert base_model(trained).generation_config is settings


def test_a_seed_repeats_and_leaves_the_random_numbers_of_the_caller(trained, tokenizer):
    sample = partial(
        generate, trained, tokenizer, [PROMPT, PROMPT], max_new_tokens=12, temperature=1.5
    )
    torch.manual_seed(7)
    first, expected = sample(seed=1), torch.rand(1)
    torch.manual_seed(7)
    assert torch.rand(1) == expected
    second, other = sample(seed=1), sample(seed=2)
    texts = [[text.token_ids for text in texts] for texts in (first, second, other)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0][0] != texts[0][1]
    with seeded(None, torch.device("cpu")):
        assert torch.rand(1) != expected


def test_the_settings_of_the_model_hold_and_the_callers_win(trained, tokenizer):
    base = base_model(trained)
    (greedy,) = generate(trained, tokenizer, PROMPT, max_new_tokens=6)
    base.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, max_length=9, num_beams=3, eos_token_id=greedy.token_ids[2]
    )
    (forced,) = generate(trained, tokenizer, PROMPT, max_new_tokens=6, temperature=0)
    assert forced.token_ids == greedy.token_ids[:3]
    assert forced.is_complete
    assert len(generate(trained, tokenizer, PROMPT, max_new_tokens=6, seed=0)[0].token_ids) <= 6


def test_a_text_ends_where_the_context_is_full(trained, tokenizer):
    (text,) = generate(trained, tokenizer, PROMPT, max_new_tokens=None)
    assert text.prompt_tokens + len(text.token_ids) == 128
    with pytest.raises(UserError, match=r"max_new_tokens=null: the model has no largest context"):
        TextGenerator(random_family("mamba"), tokenizer, max_new_tokens=None)


def test_prompts_of_every_form_are_answered(trained, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = chat_template_source("chatml")
    chat = [{"role": "user", "content": PROMPT}]
    pieces: list[str] = []
    answer = partial(generate, trained, tokenizer, max_new_tokens=4, on_text=pieces.append)
    texts = [*answer(PROMPT), *answer(chat), *answer([PROMPT, chat])]
    assert len({tuple(text.token_ids) for text in texts}) == 1
    assert "".join(pieces) == "".join(text.text for text in texts)
    assert generate(trained, tokenizer, []) == []


def test_values_that_transformers_refuses_are_errors_of_the_user(trained, tokenizer):
    trained.generation_config.min_p = 2.0
    with pytest.raises(UserError, match="settings of generate"):
        generate(trained, tokenizer, PROMPT, temperature=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be at least 1"),
        ({"max_new_tokens": "many"}, "max_new_tokens=many: must be an integer or null"),
        ({"max_new_tokens": True}, "max_new_tokens=True: must be an integer or null"),
        ({"top_k": 1.5}, "top_k=1.5: must be an integer"),
        ({"top_p": 2}, "top_p=2.0: must be at most 1"),
        ({"temperature": float("nan")}, "temperature=nan: must be finite"),
        ({"seed": 2**64}, "seed=18446744073709551616: must be at most"),
    ],
)
def test_settings_are_checked_like_the_keys_of_the_group(trained, tokenizer, settings, message):
    with pytest.raises(UserError, match=message):
        generate(trained, tokenizer, PROMPT, **settings)


def test_only_models_that_can_be_are_compiled(trained, tokenizer):
    assert TextGenerator(trained, tokenizer).compiles is False  # on a CPU
    with pytest.raises(UserError, match=r"generate\.compile=true: transformers' Mamba"):
        TextGenerator(random_family("mamba"), tokenizer, compile=True)
