"""Prompts become the tokens of the training, and those that no model can read are refused."""

from functools import cache

import pytest
from random_models import random_family
from transformers import PreTrainedTokenizerBase

from hqqtrain.common.errors import UserError
from hqqtrain.data.chat.library import chat_template_source
from hqqtrain.generation.prompts import PromptEncoder, context_length, list_prompts
from hqqtrain.models.source import TINY_FOLDER
from hqqtrain.models.tokenizer import load_tokenizer

QUESTION = "What does len do?"
MESSAGES = [{"role": "user", "content": QUESTION}]


@cache
def _model(kind: str = "llama", vocab_size: int = 4096):
    return random_family(kind, vocab_size=vocab_size)


def _tokenizer(template: str | None = None) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(TINY_FOLDER)
    tokenizer.chat_template = chat_template_source(template) if template else None
    return tokenizer


def _encoder(template: str | None = None, **options) -> PromptEncoder:
    return PromptEncoder(_model(), _tokenizer(template), **options)


def test_a_text_is_continued_without_a_template_and_answered_with_one():
    plain, chat = _encoder(), _encoder("chatml")
    assert (plain.is_chat, chat.is_chat) == (False, True)
    assert plain.encode(QUESTION) == _tokenizer()(QUESTION)["input_ids"]
    decoded = _tokenizer().decode(chat.encode(QUESTION))
    assert decoded == f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    assert chat.encode(QUESTION) == chat.encode(MESSAGES)
    assert _encoder("chatml", chat=False).encode(QUESTION) == plain.encode(QUESTION)


def test_a_system_message_is_for_chats_that_have_none():
    chat = _encoder("chatml", system="Be brief.")
    assert [m["content"] for m in chat.messages(QUESTION)] == ["Be brief.", QUESTION]
    own = [{"role": "system", "content": "Be long."}, *MESSAGES]
    assert chat.messages(own) == own


def test_the_ends_of_a_turn_are_tokens_or_texts():
    plain = _encoder("plain")
    assert (plain.end_ids, plain.end_texts) == ({0}, ())
    chat = _encoder("chatml")
    assert (chat.end_ids, chat.end_texts) == ({0}, ("<|im_end|>",))


@pytest.mark.parametrize(
    ("prompt", "template", "message"),
    [
        ("", None, "the prompt is empty"),
        (" \n", "chatml", "the prompt is empty"),
        ([], "chatml", "the prompt is empty"),
        ("word " * 64, None, r"has 128 tokens, and the context of the model has 64"),
        (MESSAGES, None, "need a chat template"),
        ("caf\udce9", None, r"has '\\udce9', which is not a character"),
        ([{"role": "user", "content": "\ud83d"}], "chatml", "not a character"),
        ([{"role": "critic", "content": "x"}], "gemma", "template does not take the messages"),
    ],
)
def test_prompts_that_cannot_be_used(prompt, template, message):
    with pytest.raises(UserError, match=message):
        _encoder(template).encode(prompt)


@pytest.mark.parametrize(
    ("prompts", "listed"),
    [(QUESTION, [QUESTION]), (MESSAGES, [MESSAGES]), ([], []),
     ([QUESTION, MESSAGES], [QUESTION, MESSAGES])],
)  # fmt: skip
def test_one_prompt_or_several(prompts, listed):
    assert list_prompts(prompts) == listed


@pytest.mark.parametrize("prompts", [5, None, [QUESTION, 7], [[QUESTION]], b"bytes", {"a": 1}])
def test_what_is_no_prompt(prompts):
    with pytest.raises(UserError, match="neither a text nor the messages of a chat"):
        list_prompts(prompts)


def test_a_chat_without_a_template_is_refused():
    with pytest.raises(UserError, match=r"generate\.system: is for chats"):
        _encoder(system="Be brief.")
    with pytest.raises(UserError, match="has no chat template"):
        _encoder(chat=True)


def test_tokens_that_the_model_does_not_have_are_refused():
    with pytest.raises(UserError, match="but the model has 96 tokens"):
        PromptEncoder(_model(vocab_size=96), _tokenizer()).encode(QUESTION)


def test_the_context_is_that_of_the_positions():
    assert context_length(_model()) == 64
    assert context_length(random_family("mamba")) is None
