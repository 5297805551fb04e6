"""A format of rows, and the checks of single values that all formats share."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from hqqtrain.data.examples import Example
from hqqtrain.data.rows import Row, RowError, quote

MAX_DEPTH = 100
"""Deepest nesting of lists and objects in a row; templates and hashes follow it recursively."""


@dataclass(frozen=True)
class Format:
    """A kind of rows that a source may have.

    Attributes:
        name: The name of the format, as in `data.format`.
        columns: The columns that are read.
        parse: Returns the example of a row, or None if the row has no text and is left out. Raises
            `RowError` if the row does not fit.
        text_column: The column that must contain text in all rows, if the format has one.
    """

    name: str
    columns: tuple[str, ...]
    parse: Callable[[Row], Example | None]
    text_column: str | None = None


def first_of(names: Iterable[str], columns: Iterable[str]) -> str | None:
    """Return the first of `names` that is a column; None if there is none."""
    columns = set(columns)
    return next((name for name in names if name in columns), None)


def kind_of(value: object) -> str:
    """Return what a value is, with its article, for messages."""
    kinds = {
        type(None): "null", bool: "a boolean", int: "a number", float: "a number", list: "a list",
        dict: "an object", str: "text", bytes: "binary",
    }  # fmt: skip
    return kinds.get(type(value), f"of the type {type(value).__name__}")


def check_text(value: object, name: str) -> str:
    """Return a value that is text.

    Raises:
        RowError: It is something else, or has half a character.
    """
    if not isinstance(value, str):
        raise RowError(f"{name} is {kind_of(value)}, not text: {quote(value)}")
    if not value.isascii():
        check_characters(value, name)
    return value


def check_characters(value: str, name: str) -> None:
    """Refuse text with half of a pair of UTF-16, which JSON may escape."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            f"{name} has {value[error.start]!a}, which is half of a character in UTF-16"
        ) from error


def check_json(value: Any, name: str) -> None:
    """Refuse what JSON does not have, as dates, deep nesting and half characters, inside a value.

    Raises:
        RowError: There is such a value.
    """
    try:
        encoded = json.dumps(value, ensure_ascii=False)
        check_characters(encoded, name)
        if encoded.count("[") + encoded.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
            raise RecursionError
    except RecursionError as error:
        raise RowError(f"{name} is too deeply nested") from error
    except (TypeError, ValueError) as error:
        if isinstance(error, RowError):
            raise
        raise RowError(f"{name} has a value that JSON does not have: {error}") from error


def _depth(value: Any) -> int:
    """Return how deeply lists and objects are nested in a value."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, list | tuple | dict)]:
        depth += 1
        level = [i for item in level for i in (item.values() if isinstance(item, dict) else item)]
    return depth


def from_json(value: Any, name: str) -> Any:
    """Return a value, which is parsed if it is JSON text, as lists are in CSV files.

    Raises:
        RowError: It is text, but not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except RecursionError as error:
        raise RowError(f"{name} is too deeply nested") from error
    except ValueError as error:
        raise RowError(f"{name} is text, but not JSON: {quote(value)}") from error
