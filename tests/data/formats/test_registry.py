"""The format of a source follows from its columns, or is refused by name."""

from collections.abc import Collection, Iterator

import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.config.groups import DataConfig
from hqqtrain.data.formats.registry import FORMATS, NEEDS, choose_format, detect_format
from hqqtrain.data.rows import Row

CHAT = [{"role": "user", "content": "a"}]


class ListedRows:
    """Rows in memory."""

    def __init__(self, *rows: Row) -> None:
        self._rows = rows

    def read(
        self, columns: Collection[str] | None, text_column: str | None = None
    ) -> Iterator[tuple[str, Row]]:
        return (("row", row) for row in self._rows)

    def column_names(self) -> list[str]:
        return list(dict.fromkeys(name for row in self._rows for name in row))

    def head(self, columns: Collection[str] | None) -> list[Row]:
        return list(self._rows)


def choose(*rows: Row, format: str = "auto", text_field: str = "text") -> tuple[str, ...]:
    found = choose_format(ListedRows(*rows), format, text_field, "data.source=x")
    return (found.name, *found.columns)


def refusal(*rows: Row, **settings: str) -> str:
    with pytest.raises(UserError) as caught:
        choose(*rows, **settings)
    return str(caught.value)


def test_every_format_of_the_configuration_is_known():
    field = DataConfig.__dataclass_fields__["format"]
    assert {"auto", *NEEDS} == set(field.metadata["choices"])
    assert {"text", *FORMATS} == set(NEEDS)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ("text", "text"), ("id text url", "text"), ("text label", "text"),
        ("messages", "chat"), ("conversations tools system", "chat"), ("messages text", "chat"),
        ("prompt prompt_id messages", "chat"), ("id conversation model", "chat"),
        ("instruction input output", "alpaca"), ("instruction output text", "alpaca"),
        ("instruction context response category", "alpaca"),
        ("prompt completion", "completion"), ("prompt completion tools", "completion"),
        ("input_ids", "tokens"), ("input_ids labels attention_mask", "tokens"),
        ("input_ids text", "text"), ("text image", "text"), ("text chosen rejected", "text"),
        ("question answer", None), ("prompt answer", None),
        ("instruction", None), ("", None),
    ],
)  # fmt: skip
def test_columns_tell_the_format(columns, expected):
    found = detect_format(columns.split(), "text", "data.source=x")
    assert (found.name if found else None) == expected


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        ("chosen rejected", "preference pairs (chosen, rejected)"),
        ("prompt chosen rejected", "preference pairs"),
        ("input preferred_output non_preferred_output", "preference pairs"),
        ("prompt completion label", "completions with a rating (completion, label, prompt)"),
        ("prompt completions labels", "steps with ratings"),
        ("messages images", "images, audio or video (images)"),
        ("messages images text", "images, audio or video (images)"),
    ],
)  # fmt: skip
def test_other_kinds_of_rows_are_refused_by_name(columns, kind):
    with pytest.raises(UserError) as caught:
        detect_format(columns.split(), "text", "data.source=x")
    assert f"data.source=x: has {kind}" in str(caught.value)
    assert "alpaca (instruction, output and maybe input)" in str(caught.value)


def test_rows_that_are_refused_are_read_after_the_change_that_the_message_names():
    pair = {"chosen": CHAT, "rejected": CHAT}
    assert "rename the column chosen: to messages if it has whole chats" in refusal(pair)
    assert choose({"messages": CHAT, "rejected": CHAT}) == ("chat", "messages")
    assert "to completion if it only answers the column prompt" in refusal(pair)
    row = {"prompt": "a", "completion": "b", "rejected": "c"}
    assert choose(row) == ("completion", "prompt", "completion")
    assert choose({"text": "a", "rejected": "b"}) == ("text", "text")
    openai = {"input": {}, "preferred_output": CHAT, "non_preferred_output": CHAT}
    assert "one list of messages: those of input and of preferred_output" in refusal(openai)
    rated = {"prompt": "a", "completion": "b", "label": True}
    assert "keep the rows whose label is true, and remove the column label" in refusal(rated)
    steps = {"prompt": "a", "completions": ["b"], "labels": [True]}
    assert "join the completions of each row in a column completion" in refusal(steps)
    assert choose({"prompt": "a", "completion": "b", "labels": [True]})[0] == "completion"


def test_pairs_beside_messages_can_be_read_if_the_format_is_named():
    row = {"messages": CHAT, "chosen": "a", "rejected": "b", "text": "c"}
    assert "To use its other columns, set data.format=chat|text." in refusal(row)
    assert choose(row, format="chat") == ("chat", "messages")
    assert choose(row, format="text") == ("text", "text")
    assert choose({**row, "chosen": None, "rejected": None}) == ("chat", "messages")


def test_columns_of_nulls_do_not_count():
    assert choose({"text": "a", "messages": None}, {"text": "b"}) == ("text", "text")
    assert choose({"messages": None}, {"messages": CHAT}) == ("chat", "messages")
    assert choose({"text": None}) == ("text", "text")
    assert choose({"messages": None}) == ("chat", "messages")
    assert choose({"messages": CHAT, "images": []}) == ("chat", "messages")


def test_a_conversation_that_is_plain_text_is_no_chat():
    assert choose({"conversation": "A: Hi", "text": "a"}) == ("text", "text")
    assert choose({"conversation": "A: Hi", "n": 1}) == ("text", "text")  # an error when it is read
    assert choose({"conversation": '[{"role": "user"}]'}) == ("chat", "conversation")


def test_a_named_column_of_text_goes_before_other_formats():
    row = {"messages": CHAT, "body": "a"}
    assert choose(row, text_field="body") == ("text", "body")
    assert choose(row, text_field="boby") == ("text", "boby")  # an error when it is read


def test_the_only_column_of_text_is_taken_and_a_named_one_never_replaced():
    assert choose({"content": "a", "n": 1}) == ("text", "content")
    assert choose({"content": "a", "n": 1}, format="text") == ("text", "content")
    assert choose({"content": "a", "n": 1}, text_field="body") == ("text", "body")
    assert choose({"content": "a", "title": "b"}) == ("text", "text")


@pytest.mark.parametrize("format", FORMATS)
def test_a_named_format_needs_its_columns(format):
    message = refusal({"text": "a", "n": 1}, format=format)
    assert f"data.format={format}: data.source=x lacks the columns {NEEDS[format]}" in message
    assert "it has text, n." in message
