"""Calls of tools in every form that data sets have: one form for chat templates."""

import json

import pytest

from hqqtrain.data.formats.tool_calls import parse_tools, tool_calls_of
from hqqtrain.data.rows import RowError

FUNCTION = {"name": "add", "arguments": {"a": 1}}
CALL = {"type": "function", "function": FUNCTION}
SCHEMA = {"type": "function", "function": {"name": "add", "parameters": {}}}


@pytest.mark.parametrize(
    "message",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": [FUNCTION]},
        {"tool_calls": json.dumps([CALL])},
        {"tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}]},
        {"function_call": FUNCTION},
        {"tool_calls": None, "function_call": {"name": "add", "arguments": '{"a": 1}'}},
    ],
)
def test_a_call_is_a_function_with_an_object(message: dict):
    assert tool_calls_of(message, "messages[1]") == [CALL]


@pytest.mark.parametrize("arguments", [None, "", " "])
def test_a_call_without_arguments_has_none(arguments):
    (call,) = tool_calls_of({"tool_calls": [{"name": "now", "arguments": arguments}]}, "m")
    assert call["function"] == {"name": "now", "arguments": {}}


def test_a_message_without_calls_has_none():
    assert tool_calls_of({}, "m") == tool_calls_of({"tool_calls": []}, "m") == []


@pytest.mark.parametrize(
    ("calls", "reason"),
    [
        (7, r"m\.tool_calls is a number, not a list of calls"),
        ([{"arguments": {}}], "without the name of a function"),
        ([{"name": "f", "arguments": [1]}], "arguments is a list, not an object"),
        ([{"name": "f", "arguments": "{"}], "arguments"),
    ],
)
def test_another_call_is_a_bad_row(calls, reason: str):
    with pytest.raises(RowError, match=reason):
        tool_calls_of({"tool_calls": calls}, "m")


@pytest.mark.parametrize(
    "row",
    [
        {"tools": [SCHEMA]},
        {"tools": json.dumps([SCHEMA])},
        {"tools": [json.dumps(SCHEMA)]},
        {"functions": [SCHEMA["function"]]},
    ],
)
def test_tools_are_schemas(row: dict):
    assert parse_tools(row) == (SCHEMA,)


@pytest.mark.parametrize("value", [None, "", []])
def test_no_tools(value):
    assert parse_tools({"tools": value}) is None


@pytest.mark.parametrize("value", [{"name": "f"}, 7, ["f("], [3]])
def test_other_tools_are_a_bad_row(value):
    with pytest.raises(RowError, match="tools"):
        parse_tools({"tools": value})
