"""Refusals of spans that are not exact, by templates made for it; see also test_templates.py."""

import pytest
from chat_templates import template_source
from transformers import AutoTokenizer

from hqqtrain.data.chat.spans import trained_spans
from hqqtrain.data.chat.template import ChatTemplate
from hqqtrain.data.chat.turns import InexactError
from hqqtrain.data.examples import Conversation
from hqqtrain.models.source import TINY_FOLDER

HEADER = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
LOOP = "{% for m in messages %}<|{{ m.role }}|>{{ BODY }}{% endfor %}" + HEADER
CHAT = Conversation(
    (
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three?"},
        {"role": "assistant", "content": "Four."},
    )
)


def spans(source: str, chat: Conversation = CHAT, loss_on: str = "assistant") -> list[str]:
    template = ChatTemplate(AutoTokenizer.from_pretrained(TINY_FOLDER), source)
    text, found = trained_spans(template, chat, loss_on)
    return [text[begin:end] for begin, end in found]


def loop(body: str) -> str:
    return LOOP.replace("{{ BODY }}", body)


def test_a_template_without_a_token_that_ends_a_turn():
    assert spans(loop("{{ m.content }}")) == ["Two.", "Four."]


def test_a_turn_that_later_turns_change_is_found_by_its_content():
    body = "{{ m.content }}{{ '' if loop.last else ' (old)' }}<|end|>"
    assert spans(loop(body)) == ["Two. (old)<|end|>", "Four.<|end|>"]


def test_the_token_after_all_turns_but_the_last_is_trained():
    body = "{{ m.content }}{% if not loop.last %}<|end|>{% endif %}"
    assert spans(loop(body)) == ["Two.<|end|>", "Four."]


@pytest.mark.parametrize(
    ("source", "message", "reason"),
    [
        (loop("{{ m.content if loop.last else '...' }}<|end|>"), 2, "leaves out its content"),
        (loop("{{ m.content }}{{ messages[-1].content }}<|end|>"), 4, "changes other parts"),
        (
            "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|><think>{% endif %}",
            2,
            "a prompt would end with '<|assistant|><think>'",
        ),
        (
            "{% for m in messages %}{{ m.content }}{% if not loop.last %}|{% endif %}{% endfor %}"
            "{{ messages | length }}",
            2,
            "no header|no token",
        ),
        (
            "{% for m in messages %}<|{{ m.role }}|>{% generation %}<|x|>{% endgeneration %}"
            "{{ m.content }}{% endfor %}",
            2,
            "leaves out its content",
        ),
    ],
)
def test_a_turn_that_is_not_exact_is_refused_by_its_number(source: str, message: int, reason: str):
    with pytest.raises(InexactError, match=rf"message {message} \(assistant\): .*({reason})"):
        spans(source)


def test_the_result_of_a_tool_inside_a_turn_is_not_trained():
    body = (
        "{{ m.content }}{% if not loop.last and messages[loop.index].role == 'tool' %}"
        "[{{ messages[loop.index].content }}]{% endif %}<|end|>"
    )
    source = LOOP.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")
    chat = Conversation(
        (
            *CHAT.messages[:2],
            {"role": "tool", "content": "42"},
            {"role": "assistant", "content": "K"},
        )
    )
    with pytest.raises(InexactError, match="text of another message"):
        spans(source.replace("{{ BODY }}", body.replace("loop.index]", "1 + loop.index0]")), chat)


def test_a_call_of_a_tool_that_is_left_out_is_refused():
    call = {"function": {"name": "look_up", "arguments": {}}}
    chat = Conversation((CHAT.messages[0], {**CHAT.messages[1], "tool_calls": [call]}))
    with pytest.raises(InexactError, match="leaves out its call of the tool 'look_up'"):
        spans(loop("{{ m.content }}<|end|>"), chat)


def test_only_the_wanted_turns_must_be_exact():
    source = loop("{{ m.content if loop.last else '...' }}<|end|>")
    assert spans(source, loss_on="last") == ["Four.<|end|>"]
    (text,) = spans(source, loss_on="all")
    assert text.endswith("Four.<|end|>")


def test_a_conversation_without_an_answer_trains_nothing():
    assert spans(loop("{{ m.content }}<|end|>"), Conversation(CHAT.messages[:1])) == []


@pytest.mark.parametrize(
    ("name", "loss_on"),
    [
        ("yujiepan-deepseek-v3-tiny-random", "assistant"),
        ("deepseek-ai-DeepSeek-V2.5", "last"),
    ],
)
def test_calls_of_templates_that_join_text_are_trained(name, loss_on):
    function = {"name": "rain", "arguments": {"city": "Oslo"}}
    calls = [{"type": "function", "function": function}]
    call = {"role": "assistant", "content": None, "tool_calls": calls}
    chat = Conversation(({"role": "user", "content": "Rain?"}, call))
    template = ChatTemplate(AutoTokenizer.from_pretrained(TINY_FOLDER), template_source(name))
    text, ((begin, end),) = trained_spans(template, chat, loss_on)
    assert 'rain\n```json\n{"city": "Oslo"}\n```' in text[begin:end]
    assert "Rain?" not in text[begin:end]
