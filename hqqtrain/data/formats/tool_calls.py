"""Calls of tools, and the tools themselves, in the form that chat templates read."""

from typing import Any

from hqqtrain.data.formats.format import check_json, from_json, kind_of
from hqqtrain.data.rows import Row, RowError, quote

TOOL_COLUMNS = ("tools", "functions")
"""The columns of tools; the second is OpenAI's older name."""


def tool_calls_of(message: dict[str, Any], place: str) -> list[dict[str, Any]]:
    """Return the calls of a message, each with a function whose arguments are an object.

    A call may be a function without the object around it, the arguments may be JSON text, and
    `function_call` is OpenAI's older name of a single call.

    Args:
        message: The message.
        place: Its name for messages, such as `messages[2]`.

    Raises:
        RowError: A call has no name, or its arguments are no object.
    """
    key = "tool_calls" if message.get("tool_calls") is not None else "function_call"
    place = f"{place}.{key}"
    calls = from_json(message.get(key) or [], place)
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list):
        raise RowError(f"{place} is {kind_of(calls)}, not a list of calls")
    return [_parse_call(from_json(call, place), place) for call in calls]


def _parse_call(call: Any, place: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(f"{place} has a call without the name of a function: {quote(call)}")
    arguments = function.get("arguments")
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}
    arguments = from_json(arguments, f"{place}: arguments")
    if not isinstance(arguments, dict):
        raise RowError(f"{place}: arguments is {kind_of(arguments)}, not an object")
    function = {**function, "arguments": arguments}
    return {"type": "function", **call, "function": function} if "function" in call else {
        "type": "function", "function": {key: function[key] for key in ("name", "arguments")},
    }  # fmt: skip


def parse_tools(row: Row) -> tuple[dict[str, Any], ...] | None:
    """Return the JSON schemas of the tools of a row; None if there are none.

    Args:
        row: The row. Its tools are a list of schemas, or JSON text of one.

    Raises:
        RowError: They are something else.
    """
    name = next((name for name in TOOL_COLUMNS if row.get(name)), TOOL_COLUMNS[0])
    value = row.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    tools = from_json(value, name)
    if not isinstance(tools, list):
        raise RowError(f"{name} is {kind_of(tools)}, not a list of tools: {quote(tools)}")
    parsed = tuple(_parse_tool(from_json(tool, name), name) for tool in tools)
    check_json(parsed, name)
    return parsed or None


def _parse_tool(tool: Any, name: str) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise RowError(f"{name} has {kind_of(tool)} instead of the schema of a tool")
    is_bare = "function" not in tool and isinstance(tool.get("name"), str)
    return {"type": "function", "function": tool} if is_bare else tool
