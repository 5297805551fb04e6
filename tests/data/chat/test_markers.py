"""Markers of a template that a tokenizer lacks."""

import pytest

from hqqtrain.data.chat.library import chat_template_source
from hqqtrain.data.chat.markers import missing_markers
from hqqtrain.data.chat.template import ChatTemplate
from hqqtrain.models.source import TINY_FOLDER
from hqqtrain.models.tokenizer import load_tokenizer


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", ["<|im_start|>", "<|im_end|>"]),
        ("llama3", ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
        ("gemma", ["<start_of_turn>", "<end_of_turn>"]),
        ("mistral", ["[INST]", "[/INST]"]),
        ("plain", []),
    ],
)
def test_the_markers_of_the_shipped_templates(name, expected):
    tokenizer = load_tokenizer(TINY_FOLDER)
    template = ChatTemplate(tokenizer, chat_template_source(name))
    assert missing_markers(template, tokenizer) == expected
    tokenizer.add_tokens(expected[1:], special_tokens=True)
    assert missing_markers(template, tokenizer) == expected[:1]
