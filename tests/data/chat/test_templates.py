"""The spans of chat templates as models ship them, against an oracle written by hand.

The oracle is `tests/helpers/chat_oracle.py`; its author did not see the code that it judges.
"""

import re

import pytest
from chat_conversations import CONVERSATIONS
from chat_facts import FACTS
from chat_oracle import expected_spans, expected_text
from chat_templates import (
    exact_conversations,
    example,
    refusal,
    render,
    renders,
    tokenizer_for,
)

from hqqtrain.data.chat.encoding import ChatEncoder
from hqqtrain.data.chat.spans import trained_spans
from hqqtrain.data.chat.template import ChatTemplate
from hqqtrain.data.chat.turns import InexactError

FEWEST_CONVERSATIONS = 8  # each template renders at least these: the others may need tools

WITH_EDGES = {"one", "turns", "padded", "unicode", "empty_last", "thinking", "tools", "tools_null"}
"""Conversations for the tokens: at the edges of their spans stand all kinds of characters."""


def marked(text: str, spans: list[tuple[int, int]]) -> str:
    """Return a text with its spans in ⟦ ⟧, for a person to read."""
    for start, end in reversed(spans):
        text = f"{text[:start]}⟦{text[start:end]}⟧{text[end:]}"
    return text


@pytest.fixture(scope="module", params=FACTS)
def name(request) -> str:
    """A template; all tests of one run in a row, while it is compiled."""
    return request.param


def test_the_table_has_many_families_and_few_templates_without_an_exact_conversation():
    families = "Qwen2 Qwen2.5 Qwen3 SmolLM2 SmolLM3 Llama-3 Llama-3.1 Llama-3.2 Llama4 CodeLlama "
    families += "Mistral-7B Nemo Ministral gemma gemma-2 gemma3 gemma-4 Phi-3 phi-4 DeepSeek-V2 "
    families += "deepseekv3 r1 command-r cohere falcon Falcon3 OmniLMM WizardLM OLMoE Olmo-3 Tulu "
    families += "granite chatglm3 glm-4 GLM-4.5 gpt-oss Yi internlm MiniCPM stable Nemotron Hermes "
    families += "EXAONE Kimi SOLAR openchat Jamba Hunyuan ERNIE Apertus LFM2 MiniMax Seed-OSS"
    assert [f for f in families.split() if not any(f in template for template in FACTS)] == []
    exact = [template for template in FACTS if exact_conversations(template)]
    assert len(exact) >= 100
    assert sum(not template.startswith("trl/") for template in exact) >= 80


def test_oracle_agrees_with_the_messages(name):
    """Read off the messages alone: a span holds its turn's text and no other turn's."""
    rows = [row for row in CONVERSATIONS if renders(name, row)]
    tool_use = name.endswith("tool_use")
    assert len(rows) >= (3 if tool_use else FEWEST_CONVERSATIONS)
    for row in exact_conversations(name):
        text, (messages, _) = render(name, row), CONVERSATIONS[row]
        spans = expected_spans(name, text)
        turns = [m for m in messages if m["role"] == "assistant"]
        turns = [
            m for m in turns if m["content"] or m.get("tool_calls") or len(spans) == len(turns)
        ]
        assert len(spans) == len(turns), (row, marked(text, spans))
        others = [m["content"] for m in messages if m["role"] != "assistant"]
        for turn, (start, end) in zip(turns, spans, strict=True):
            span = text[start:end]
            answer = (turn["content"] or "").rpartition("</think>")[2].strip()
            assert answer in span or answer not in text, (row, marked(text, spans))
            if row != "repeated":
                assert not any(other.strip() in span for other in others), (row, span)


def test_spans_equal_the_oracle(name):
    template = ChatTemplate(tokenizer_for(name), None)
    for row in exact_conversations(name):
        text, spans = trained_spans(template, example(row), "assistant")
        assert text == render(name, row), row
        spans = [span for span in spans if span[0] < span[1]]
        assert marked(text, spans) == marked(text, expected_spans(name, text)), row


def test_turns_that_cannot_be_told_are_refused(name):
    rows = [row for row in CONVERSATIONS if renders(name, row) and refusal(name, row)]
    template = ChatTemplate(tokenizer_for(name), None)
    for row in rows:
        with pytest.raises(InexactError, match=r"message \d") as error:
            trained_spans(template, example(row), "assistant")
        turn = int(re.search(r"message (\d)", str(error.value))[1]) - 1
        assert CONVERSATIONS[row][0][turn]["role"] == "assistant", row


def test_trained_tokens_are_the_text_of_the_spans(name):
    tokenizer = tokenizer_for(name)
    encoder = ChatEncoder(tokenizer, ChatTemplate(tokenizer, None), "assistant")
    for row in WITH_EDGES.intersection(exact_conversations(name)):
        text = render(name, row)
        ids, targets = encoder.encode(example(row))
        assert tokenizer.decode(ids).removesuffix(tokenizer.eos_token) == text.removesuffix(
            tokenizer.eos_token
        ), row
        assert tokenizer.decode(ids[targets]) == expected_text(name, text), row


def test_other_turns_to_train_on_are_some_of_the_oracles(name):
    rows = exact_conversations(name)
    row = next((row for row in ("turns", "tools", "tools_twice", "one") if row in rows), None)
    if row is None:
        return  # every conversation is refused
    template = ChatTemplate(tokenizer_for(name), None)
    text = render(name, row)
    every = expected_spans(name, text)
    first = next(i for i, m in enumerate(CONVERSATIONS[row][0]) if m["role"] == "assistant")
    cases = [
        ("last", example(row), every[-1:]),
        ("completion", example(row, completion_start=first + 1), every[1:]),
        ("assistant", example(row, untrained=frozenset({first})), every[1:]),
        ("all", example(row), [(0, len(text))]),
    ]
    for loss_on, conversation, expected in cases:
        assert trained_spans(template, conversation, loss_on) == (text, expected), loss_on
