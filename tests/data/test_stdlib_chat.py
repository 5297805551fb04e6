"""Conversations about the standard library: short, the same every time, split by module."""

import inspect
import re
import shlex

import pytest

from hqqtrain.data.examples import Conversation
from hqqtrain.data.stdlib import is_held_out
from hqqtrain.data.stdlib_chat import SYSTEM, stdlib_conversations

Split = dict[str, list[Conversation]]


@pytest.fixture(scope="module")
def splits() -> Split:
    return {split: list(stdlib_conversations(split)) for split in ("train", "held_out")}


def _texts(conversations: list[Conversation], role: str) -> list[str]:
    messages = (message for each in conversations for message in each.messages)
    return [message["content"] for message in messages if message["role"] == role]


def test_every_question_has_an_answer(splits: Split):
    for conversation in (*splits["train"], *splits["held_out"]):
        roles = [message["role"] for message in conversation.messages]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2)
        assert all(message["content"].strip() for message in conversation.messages)
        assert sum(len(message["content"]) for message in conversation.messages) < 4000


def test_there_are_a_few_hundred_of_several_kinds(splits: Split):
    assert 150 < len(splits["train"]) < 1000
    assert len(splits["held_out"]) > 15
    systems = _texts(splits["train"], "system")
    assert set(systems) == {SYSTEM}
    assert 0.3 < len(systems) / len(splits["train"]) < 0.7
    lengths = [len([m for m in c.messages if m["role"] == "user"]) for c in splits["train"]]
    assert set(lengths) == {1, 2, 3}
    starts = {" ".join(text.split()[:2]) for text in _texts(splits["train"], "user")}
    assert starts == {"What does", "I use", "In which", "How is"}


def test_they_are_the_same_every_time(splits: Split):
    assert list(stdlib_conversations("held_out")) == splits["held_out"]


def test_no_module_is_trained_and_held_out(splits: Split):
    for split, held_out in (("train", False), ("held_out", True)):
        questions = " ".join(_texts(splits[split], "user"))
        modules = re.findall(r"I use the module ([\w.]+)\.", questions)
        assert modules
        assert {is_held_out(module) for module in modules} == {held_out}


def test_an_answer_is_a_docstring_of_the_interpreter(splits: Split):
    """The sources are parsed. The docstrings are those of the imported functions."""
    texts = " ".join(" ".join(_texts(each, "assistant")) for each in splits.values())
    texts += " ".join(" ".join(_texts(each, "user")) for each in splits.values())
    for function in (shlex.split, shlex.join, shlex.quote):
        paragraph = inspect.getdoc(function).split("\n\n")[0]
        assert " ".join(paragraph.split()) in texts
