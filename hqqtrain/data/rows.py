"""Rows of data sets, as dicts with their places, and the error of a row that cannot be used."""

from collections.abc import Collection, Iterator
from typing import Any, Protocol

Row = dict[str, Any]
"""The columns of a row by name. Columns that were not asked for may be missing."""

HEAD_ROWS = 100
"""Number of rows from the beginning of a source that tell its format."""


class RowError(ValueError):
    """A row cannot be used. The message is the reason; the caller adds the file and the line."""


class Rows(Protocol):
    """The rows of files, or of a split of a hub data set. Every call reads them again."""

    def read(
        self, columns: Collection[str] | None, text_column: str | None = None
    ) -> Iterator[tuple[str, Row | RowError]]:
        """Yield each row with its place, such as `a.jsonl, line 7`.

        Args:
            columns: The columns that are needed; None: all. More may be returned.
            text_column: The column that must contain text, if its type is known for all rows.

        Raises:
            UserError: The rows cannot be read.
        """

    def column_names(self) -> list[str]:
        """Return the names of the columns, without reading more than the first rows."""

    def head(self, columns: Collection[str] | None) -> list[Row]:
        """Return the first rows, at most `HEAD_ROWS` of a file; bad rows are left out."""


def quote(value: object, length: int = 60) -> str:
    """Return the beginning of a value, as a message shows it."""
    shown = repr(value)
    return shown if len(shown) <= length else f"{shown[:length]}..."
