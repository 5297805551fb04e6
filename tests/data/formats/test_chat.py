"""Chats in every spelling become the messages that chat templates read."""

import json

import pytest

from hqqtrain.data.examples import Conversation
from hqqtrain.data.formats import chat
from hqqtrain.data.rows import RowError

TURNS = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"})
SYSTEM = {"role": "system", "content": "Be brief"}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "x", "n": None}}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def parse(**row: object) -> Conversation:
    found = chat.match(row)
    assert found is not None
    assert set(found.columns) == set(row)
    example = found.parse(row)
    assert isinstance(example, Conversation)
    return example


def refusal(**row: object) -> str:
    with pytest.raises(RowError) as caught:
        parse(**row)
    return str(caught.value)


@pytest.mark.parametrize("column", ["messages", "conversations", "conversation"])
@pytest.mark.parametrize("is_json", [False, True])
def test_both_spellings_are_the_same_conversation(column, is_json):
    openai = [SYSTEM, *TURNS, {"role": "tool", "content": "x"}]
    sharegpt = [
        {"from": "system", "value": "Be brief"}, {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello"}, {"from": "observation", "value": "x"},
    ]  # fmt: skip
    for messages in (openai, sharegpt):
        value = json.dumps(messages) if is_json else messages
        assert parse(**{column: value}) == Conversation(tuple(openai))


@pytest.mark.parametrize(
    ("spelling", "role"),
    [
        ("developer", "system"), ("human", "user"), ("User", "user"), ("gpt", "assistant"),
        ("model", "assistant"), ("function", "tool"), ("tool", "tool"), ("observation", "tool"),
    ],
)  # fmt: skip
def test_roles(spelling, role):
    for key, text in (("role", "content"), ("from", "value")):
        (message,) = parse(messages=[{key: spelling, text: "x"}]).messages
        assert message == {"role": role, "content": "x"}


def test_a_column_for_the_system_prompt():
    assert parse(messages=list(TURNS), system="Be brief").messages == (SYSTEM, *TURNS)
    for empty in (None, "", " "):
        assert parse(messages=list(TURNS), system=empty).messages == TURNS
    assert "also a first message" in refusal(messages=[SYSTEM, *TURNS], system="Be long")
    excluded = parse(messages=[TURNS[0], {**TURNS[1], "weight": 0}], system="Be brief")
    assert excluded.untrained == {2}


def test_weights_exclude_messages_of_the_assistant():
    messages = [
        {"role": "user", "content": "a", "weight": 0},
        {"role": "assistant", "content": "b", "weight": 0},
        {"role": "assistant", "content": "c", "weight": 1.0},
        {"role": "assistant", "content": "d", "weight": None},
    ]
    conversation = parse(messages=messages)
    assert conversation.untrained == {1}
    assert all(set(message) == {"role", "content"} for message in conversation.messages)
    assert "messages[0].weight is 0.5; it may be 0 or 1" in refusal(
        messages=[{**TURNS[1], "weight": 0.5}]
    )


@pytest.mark.parametrize(
    "calls",
    [
        [CALL], json.dumps([CALL]), [json.dumps(CALL)], [CALL["function"]],
        [{**CALL, "function": {"name": "look", "arguments": '{"at": "x", "n": null}'}}],
    ],
)  # fmt: skip
@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_calls_of_tools(calls, content):
    (message,) = parse(messages=[{"role": "assistant", "tool_calls": calls, **content}]).messages
    assert message == {"role": "assistant", "content": "", "tool_calls": [CALL]}


def test_calls_keep_their_ids_and_results_name_them():
    call = {"id": "call_1", **CALL}
    messages = [
        {"role": "assistant", "content": "I look.", "tool_calls": [call]},
        {"role": "tool", "content": "found", "tool_call_id": "call_1", "name": "look"},
    ]
    assert parse(messages=messages).messages == tuple(messages)


def test_older_spellings_of_calls():
    call = {"name": "look", "arguments": '{"at": "x", "n": null}'}
    expected = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    for message in (
        {"role": "assistant", "content": None, "function_call": call},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "function_call", "value": json.dumps([call])},
    ):
        assert parse(messages=[message]).messages == (expected,)
    assert parse(messages=[{**TURNS[1], "tool_calls": [], "function_call": None}]).messages == (
        TURNS[1],
    )


def test_tools_are_schemas_or_their_json():
    for tools in ([TOOL], [TOOL["function"]], json.dumps([TOOL]), [json.dumps(TOOL)]):
        assert parse(messages=list(TURNS), tools=tools).tools == (TOOL,)
        assert parse(messages=list(TURNS), functions=tools).tools == (TOOL,)
        assert parse(messages=list(TURNS), functions=tools, tools=None).tools == (TOOL,)
    for none in (None, [], "", "[]"):
        assert parse(messages=list(TURNS), tools=none).tools is None


def test_content_in_parts_is_joined_if_it_is_text():
    parts = [{"type": "text", "text": "a "}, "b", {"text": "c"}]
    (message,) = parse(messages=[{"role": "user", "content": parts}]).messages
    assert message["content"] == "a bc"
    image = [*parts, {"type": "image_url", "image_url": {"url": "x"}}]
    assert "messages[0] has a part of the type 'image_url'; only text can be read" in refusal(
        messages=[{"role": "user", "content": image}]
    )


def test_what_a_template_may_read_is_kept_and_nulls_are_not():
    message = {
        "role": "assistant", "content": "a", "reasoning_content": "b", "name": "Bo", "audio": None,
        "refusal": None,
    }  # fmt: skip
    (kept,) = parse(messages=[message]).messages
    assert kept == {
        "role": "assistant", "content": "a", "reasoning_content": "b", "name": "Bo",
    }  # fmt: skip


def test_a_sequence_of_objects_that_datasets_has_turned_into_lists():
    columns = {"from": ["human", "gpt"], "value": ["Hi", "Hello"], "weight": [None, 0]}
    conversation = parse(conversations=columns)
    assert conversation == Conversation(TURNS, untrained=frozenset({1}))


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (None, "messages is null, not a list of messages"), ([], "messages is an empty list"),
        ("Hello", "messages is text, but not JSON"), ("[{'role': 'user'}]", "but not JSON"),
        (7, "messages is a number, not"), ({"role": "user"}, "messages is an object"),
        (["Hi"], "messages[0] is text, not an object"),
        ([{"content": "a"}], "messages[0] has no role; its keys are content"),
        ([{"role": None, "content": "a"}], "messages[0] has no role"),
        ([{"role": 3, "content": "a"}], "messages[0].role is a number, not text"),
        ([{"role": "moderator", "content": "a"}], "messages[0].role is 'moderator'; known are"),
        ([TURNS[0], {"role": "assistant"}], "messages[1] has no content"),
        ([{"role": "user", "content": None}], "messages[0] has no content"),
        ([{"role": "user", "content": 5}], "messages[0].content is a number, not text: 5"),
        ([{"role": "user", "content": {"a": 1}}], "messages[0].content is an object"),
        ([{"role": "user", "content": [3]}], "messages[0] has a part that is a number"),
        ([{"role": "user", "content": "\ud800"}], "messages[0].content has '\\ud800'"),
        ([{"role": "assistant", "content": "", "tool_calls": [{"id": "a"}]}], "without the name"),
        ([{"role": "assistant", "content": "", "tool_calls": 3}], "is a number, not a list of cal"),
        ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}], "not JSON"),
        ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}],
         "arguments is a list, not an object"),
        ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": "\udfff"}}]}],
         "messages has '\\udfff'"),
        ([{"from": "function_call", "value": "look"}], "is text, but not JSON"),
    ],
)  # fmt: skip
def test_bad_messages_are_named(messages, reason):
    assert reason in refusal(messages=messages)


@pytest.mark.parametrize(
    ("tools", "reason"),
    [("[", "tools is text, but not JSON"), ({"a": 1}, "tools is an object"), ([5], "has a number")],
)
def test_bad_tools_are_named(tools, reason):
    assert reason in refusal(messages=list(TURNS), tools=tools)


@pytest.mark.parametrize("levels", [120, 900, 100_000])
def test_deep_nesting_is_refused(levels):
    deep: dict = {}
    for _ in range(levels):
        deep = {"a": deep}
    call = {"name": "f", "arguments": deep}
    assert "too deeply nested" in refusal(messages=[{"role": "assistant", "tool_calls": [call]}])
    assert "too deeply nested" in refusal(messages="[" * 100_000)
    many = {"role": "assistant", "content": "[{" * 500}  # brackets in a text are no nesting
    assert parse(messages=[many] * 200).messages == (many,) * 200


def test_rows_without_messages_are_no_chats():
    assert chat.match(["text", "tools"]) is None
