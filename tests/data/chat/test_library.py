"""The shipped chat templates: the same spans by their marks as without them, and their names."""

import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from hqqtrain.common.errors import UserError
from hqqtrain.data.chat.library import chat_template_source, template_names
from hqqtrain.data.chat.spans import trained_spans
from hqqtrain.data.chat.template import ChatTemplate
from hqqtrain.data.examples import Conversation
from hqqtrain.models.source import TINY_FOLDER

CHAT = Conversation(
    (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three?"},
        {"role": "assistant", "content": "Four."},
    )
)
ENDS = {
    "chatml": "<|im_end|>", "gemma": "<end_of_turn>", "llama3": "<|eot_id|>", "mistral": "<eos>",
    "plain": "<eos>",
}  # fmt: skip


@pytest.mark.parametrize("name", template_names())
def test_marks_equal_what_is_found_without_them(name: str):
    tokenizer = AutoTokenizer.from_pretrained(TINY_FOLDER)
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    source = chat_template_source(name)
    assert source is not None
    marked, unmarked = (
        trained_spans(ChatTemplate(tokenizer, text), CHAT, "assistant")
        for text in (source, re.sub(r"\{%- (end)?generation %\}", "", source))
    )
    assert marked == unmarked
    text, spans = marked
    end = ENDS[name].replace("<eos>", "</s>")
    assert [text[a:b].lstrip() for a, b in spans] == [f"Two.{end}", f"Four.{end}"]
    assert text.count("Be brief.") == 1


def test_a_file_may_be_given(tmp_path: Path):
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages }}")
    assert chat_template_source(str(file)) == "{{ messages }}"
    assert chat_template_source("auto") is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("chatlm", r"data.chat_template=chatlm: allowed are auto, chatml, .*Did you mean.*chatml"),
        ("../secret", "allowed are"),
        ("missing.jinja", "data.chat_template=missing.jinja: cannot be read: No such file"),
    ],
)
def test_other_names_are_refused(name: str, message: str):
    with pytest.raises(UserError, match=message):
        chat_template_source(name)


def test_the_help_names_all_templates():
    from hqqtrain.config.groups import DataConfig

    field = DataConfig.__dataclass_fields__["chat_template"]
    assert all(name in field.metadata["help"] for name in template_names())
