"""The tokens that end a turn of the assistant, for the kinds of templates that there are."""

import pytest
from transformers import AutoTokenizer

from hqqtrain.data.chat.end_markers import end_markers
from hqqtrain.data.chat.template import ChatTemplate
from hqqtrain.models.source import TINY_FOLDER

PROMPT = "{% if add_generation_prompt %}<|assistant|>{% endif %}"

INST = "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} "
END = "{{ '<|return|>' if loop.last and m.role != 'user' else '<|end|>' }}"


def loop(body: str, prompt: str = PROMPT) -> str:
    return "{% for m in messages %}" + body + "{% endfor %}" + prompt


@pytest.mark.parametrize(
    ("source", "markers"),
    [
        (loop("<|{{ m.role }}|>{{ m.content }}<|end|>\n"), ("<|end|>",)),
        (loop("<|{{ m.role }}|>{{ m.content }}"), ()),
        (loop("{{ m.role }}: {{ m.content }}\n", "assistant: "), ()),
        (loop(INST + "{{ m.content }}</s>{% endif %}", ""), ("</s>",)),
        (loop(INST + "{{ m.content }} {% endif %}", ""), ()),
        (loop("<|{{ m.role }}|>{{ m.content }}" + END), ("<|return|>", "<|end|>")),
    ],
)  # fmt: skip
def test_the_tokens_that_end_a_turn(source: str, markers: tuple[str, ...]):
    template = ChatTemplate(AutoTokenizer.from_pretrained(TINY_FOLDER), source)
    assert end_markers(template) == markers
