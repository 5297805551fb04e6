"""Prompts and completions, as texts and as messages."""

import pytest

from hqqtrain.data.examples import Completion, Conversation
from hqqtrain.data.formats import completion
from hqqtrain.data.rows import RowError

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


def parse(**row: object) -> Completion | Conversation:
    found = completion.match(row)
    assert found is not None
    example = found.parse(row)
    assert isinstance(example, Completion | Conversation)
    return example


def test_texts_stay_as_they_are():
    assert parse(prompt="a ", completion=" b\n", id=3) == Completion("a ", " b\n")


def test_messages_are_one_conversation():
    tool = {"type": "function", "function": {"name": "f"}}
    row = {"prompt": [USER, ANSWER, USER], "completion": [{**ANSWER, "weight": 0}, USER, ANSWER]}
    expected = Conversation((USER, ANSWER, USER, ANSWER, USER, ANSWER), (tool,), 3, frozenset({3}))
    assert parse(**row, tools=[tool]) == expected


@pytest.mark.parametrize(
    ("prompt", "answer", "reason"),
    [
        ([USER], "Hello", "prompt is a list and completion is text; both must be texts, or lists"),
        ("Hi", [ANSWER], "prompt is text and completion is a list"),
        ("Hi", None, "completion is null"), (None, "Hi", "prompt is null"), (5, "a", "a number"),
        ([USER], [], "completion is an empty list"), ([USER], [5], "completion[0] is a number"),
    ],
)  # fmt: skip
def test_bad_rows_are_named(prompt, answer, reason):
    with pytest.raises(RowError) as caught:
        parse(prompt=prompt, completion=answer)
    assert reason in str(caught.value)


def test_the_columns():
    assert completion.match(["prompt", "answer"]) is None
