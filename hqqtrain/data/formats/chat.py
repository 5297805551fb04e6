"""Chats: a list of messages, with the keys of OpenAI or of ShareGPT.

All spellings become the messages that chat templates read: the roles system, user, assistant and
tool, content that is text, and calls of tools whose arguments are objects.
"""

from collections.abc import Collection
from typing import Any

from hqqtrain.data.examples import Conversation, Message
from hqqtrain.data.formats.format import (
    Format,
    check_json,
    check_text,
    first_of,
    from_json,
    kind_of,
)
from hqqtrain.data.formats.tool_calls import TOOL_COLUMNS, parse_tools, tool_calls_of
from hqqtrain.data.rows import Row, RowError, quote

NAME, NEEDS = "chat", "messages, or conversations, as lists of messages"

MESSAGE_COLUMNS = ("messages", "conversations", "conversation")

SYSTEM = "system"

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "function_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool",
}  # fmt: skip
"""Role of OpenAI or ShareGPT -> role of chat templates."""

_TEXT_PARTS = ("text", "input_text", "output_text")
_JSON_TYPES = (str, int, float, list, dict)
_NOT_PASSED_ON = ("role", "from", "content", "value", "weight", "function_call", "tool_calls")


def match(columns: Collection[str]) -> Format | None:
    """Return the format of rows with these columns; None if they are no chats."""
    column = first_of(MESSAGE_COLUMNS, columns)
    if column is None:
        return None
    others = tuple(name for name in (SYSTEM, *TOOL_COLUMNS) if name in columns)
    return Format(NAME, (column, *others), lambda row: parse(row, column))


def parse(row: Row, column: str) -> Conversation:
    """Return the conversation of a row.

    Raises:
        RowError: The row has no messages, or one of them cannot be read.
    """
    messages, untrained = parse_messages(row.get(column), column)
    system = row.get(SYSTEM)
    if system is not None and check_text(system, SYSTEM).strip():
        if messages[0]["role"] == "system":
            raise RowError(f"has a column {SYSTEM} and also a first message of that role")
        messages = (Message(role="system", content=system), *messages)
        untrained = frozenset(index + 1 for index in untrained)
    return Conversation(messages, parse_tools(row), None, untrained)


def parse_messages(value: Any, name: str) -> tuple[tuple[Message, ...], frozenset[int]]:
    """Return messages as chat templates read them, and the indices of those with `weight: 0`.

    Args:
        value: A list of messages, or JSON text of one, as in CSV files.
        name: The name of the value, for messages.

    Raises:
        RowError: It is no list of messages.
    """
    items = from_json(value, name)
    if isinstance(items, dict):
        items = _transposed(items)
    if not isinstance(items, list):
        raise RowError(f"{name} is {kind_of(items)}, not a list of messages: {quote(items)}")
    if not items:
        raise RowError(f"{name} is an empty list")
    places = [f"{name}[{index}]" for index in range(len(items))]
    messages = tuple(map(_parse_message, items, places))
    check_json(messages, name)
    untrained = (
        index
        for index, (item, place) in enumerate(zip(items, places, strict=True))
        if not _is_trained(item, place) and messages[index]["role"] == "assistant"
    )
    return messages, frozenset(untrained)


def _transposed(columns: dict[str, Any]) -> Any:
    """Return the messages of an object of lists, as `datasets` stores a sequence of objects."""
    lists = list(columns.values())
    if not lists or not all(isinstance(v, list) and len(v) == len(lists[0]) for v in lists):
        return columns
    return [
        {k: v for k, v in zip(columns, values, strict=True) if v is not None}
        for values in zip(*lists, strict=True)
    ]


def _parse_message(item: Any, place: str) -> Message:
    if not isinstance(item, dict):
        raise RowError(f"{place} is {kind_of(item)}, not an object with role and content")
    given = first_of(("role", "from"), (key for key, value in item.items() if value is not None))
    if given is None:
        raise RowError(f"{place} has no role; its keys are {', '.join(map(str, item))[:100]}")
    spelling = check_text(item[given], f"{place}.{given}").strip().lower()
    role = ROLES.get(spelling)
    if role is None:
        raise RowError(f"{place}.{given} is {quote(item[given])}; known are {', '.join(ROLES)}")
    others = {
        key: value
        for key, value in item.items()
        if key not in _NOT_PASSED_ON and isinstance(value, _JSON_TYPES)
    }
    content = item.get("content")
    if content is None:
        content = item.get("value")
    if spelling == "function_call":  # of ShareGPT: the content is the call
        calls = tool_calls_of({"tool_calls": content}, place)
        return Message(role=role, content="", **others, tool_calls=calls)
    calls = tool_calls_of(item, place) if role == "assistant" else []
    is_optional = bool(calls) or (role == "assistant" and bool(others.get("reasoning_content")))
    message = Message(role=role, content=_text_of_content(content, place, is_optional), **others)
    return {**message, "tool_calls": calls} if calls else message


def _text_of_content(content: Any, place: str, is_optional: bool) -> str:
    """Return the text of a content, which may have parts; parts follow each other directly."""
    if content is None:
        if is_optional:
            return ""
        raise RowError(f"{place} has no content")
    if not isinstance(content, list):
        return check_text(content, f"{place}.content")
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if isinstance(part, str):
            texts.append(part)
        elif kind in _TEXT_PARTS:
            texts.append(check_text(part.get("text"), f"the text of a part of {place}"))
        else:
            what = f"of the type {kind!r}" if isinstance(part, dict) else f"that is {kind_of(part)}"
            raise RowError(f"{place} has a part {what}; only text can be read")
    return "".join(texts)


def _is_trained(item: dict[str, Any], place: str) -> bool:
    """Whether `weight`, as OpenAI has it, does not exclude a message."""
    weight = item.get("weight")
    if weight not in (None, 0, 1):
        raise RowError(f"{place}.weight is {quote(weight)}; it may be 0 or 1")
    return weight != 0
