"""The part of one turn in a rendered chat: by prefixes, by context, or refused."""

import pytest
from transformers import AutoTokenizer

from hqqtrain.data.chat.end_markers import end_markers
from hqqtrain.data.chat.template import ChatTemplate
from hqqtrain.data.chat.turns import InexactError, RenderedChat
from hqqtrain.data.examples import Conversation
from hqqtrain.models.source import TINY_FOLDER

PROMPT = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
PLAIN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}" + PROMPT
LATER_TURNS_CHANGE_IT = PLAIN.replace("<|end|>", "{% if loop.last %} (the last){% endif %}<|end|>")
NOTHING_ENDS_IT = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
MESSAGES = (
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "One."},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "Two."},
)


def rendered(source: str) -> RenderedChat:
    template = ChatTemplate(AutoTokenizer.from_pretrained(TINY_FOLDER), source)
    text = template.render(MESSAGES)
    return RenderedChat(template, Conversation(MESSAGES), text, end_markers(template))


@pytest.mark.parametrize(
    ("source", "first", "last"),
    [
        (PLAIN, "One.<|end|>", "Two.<|end|>"),
        (LATER_TURNS_CHANGE_IT, "One.<|end|>", "Two. (the last)<|end|>"),
    ],
)
def test_a_turn_is_what_the_assistant_says_with_its_end(source: str, first: str, last: str):
    chat = rendered(source)
    for turn, expected in ((1, first), (3, last)):
        begin, end = chat.span(turn)
        assert chat.text[begin:end] == expected
        assert chat.text[:begin].endswith("<|assistant|>")


def test_a_turn_without_header_and_end_is_refused_by_its_number():
    with pytest.raises(InexactError, match=r"message 2 \(assistant\): .* no header shows where"):
        rendered(NOTHING_ENDS_IT).span(1)


def test_marks_belong_to_the_turn_that_they_are_in():
    chat = rendered(PLAIN)
    found = [chat.text.index(words) for words in ("On", "e.", "Two")]
    on, e, two = ((begin, begin + 2) for begin in found)
    assert chat.marks_by_turn([on, two]) == {1: [on], 3: [two]}
    assert chat.marks_by_turn([on, e, two]) == {1: [on, e], 3: [two]}
