"""Read the rows of text, JSON, CSV, parquet and Arrow files.

Only the columns that were asked for are read from parquet and Arrow, so no other column can be an
obstacle. Rows are streamed: a file of any size needs the memory of one row, or of one batch. Every
error names the file and the line or row. A row that is no object, as a line that was cut, is
yielded as a `RowError`, because the rows after it can be read.
"""

import csv
import json
from collections.abc import Callable, Collection, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from hqqtrain.common.errors import UserError
from hqqtrain.data.arrow import arrow_columns, arrow_rows, parquet_columns, parquet_rows
from hqqtrain.data.rows import HEAD_ROWS, Row, RowError
from hqqtrain.data.text_files import (
    MAX_ROW_BYTES,
    UnreadableError,
    read_all,
    read_lines,
    read_text,
    with_newlines,
)

TEXT_COLUMN = "text"
"""The column of a file of plain text, which is one row."""

_HEAD_FILES = 10

Columns = Collection[str] | None
PlacedRows = Iterator[tuple[str, Row | RowError]]


class FileRows:
    """The rows of several files, in order. Every iteration reads the files again.

    Args:
        files: The files; empty ones are allowed.
        file_type: Their type: `text`, `jsonl`, `csv`, `parquet` or `arrow`.
        where: `key=source` for messages, such as `data.source=texts`.
    """

    def __init__(self, files: list[Path], file_type: str, where: str) -> None:
        self.files, self.file_type, self._where = files, file_type, where

    def read(self, columns: Columns, text_column: str | None = None) -> PlacedRows:
        """Yield each row with its place; see `Rows.read`.

        Raises:
            UserError: A file cannot be read.
        """
        for file in self.files:
            try:
                if file.stat().st_size == 0:
                    continue
                for place, row in _READERS[self.file_type](file, columns, text_column):
                    yield f"{file}{place}", row
            except OSError as error:
                reason = error.strerror or str(error)
                raise UserError(f"{self._where}: cannot read {file}: {reason}.") from error
            except UnreadableError as error:
                raise UserError(f"{self._where}: cannot read {file}{error}") from error

    def single_files(self) -> Iterator["FileRows"]:
        """Yield the rows of each file, in order."""
        return (FileRows([file], self.file_type, self._where) for file in self.files)

    def is_empty(self) -> bool:
        """Whether every file has 0 bytes."""
        return not any(file.stat().st_size for file in self.files)

    def column_names(self) -> list[str]:
        """Return the columns that the first rows of the files have."""
        names: dict[str, None] = {}
        for file in self.files[:_HEAD_FILES]:
            try:
                names |= dict.fromkeys(_COLUMNS[self.file_type](file) if _size(file) else ())
            except (OSError, UnreadableError):
                break  # whoever reads the rows gets the error
        return list(names)

    def head(self, columns: Columns) -> list[Row]:
        """Return the needed columns of the first rows of the first files."""
        rows: list[Row] = []
        for file in self.files[:_HEAD_FILES]:
            try:
                if _size(file):
                    found = islice(_READERS[self.file_type](file, columns, None), HEAD_ROWS)
                    rows += [
                        {k: v for k, v in row.items() if columns is None or k in columns}
                        for _, row in found
                        if isinstance(row, dict)
                    ]
            except (OSError, UnreadableError):
                break
        return rows


def _size(file: Path) -> int:
    return file.stat().st_size


def _read_text(file: Path, columns: Columns, text_column: str | None) -> PlacedRows:
    """Yield the whole file as one row."""
    yield "", {TEXT_COLUMN: read_text(file)}


def _read_json(file: Path, columns: Columns, text_column: str | None) -> PlacedRows:
    """Yield the rows of JSON Lines, or of one array of objects."""
    is_first = True
    for number, line in read_lines(file):
        content = line.strip()
        if not content:
            continue
        # A file may be one JSON value over several lines instead of one row per line.
        is_array = is_first and content.startswith(b"[")
        is_first = False
        if is_array or content == b"{":
            try:
                value = _parse_json(read_all(file))
            except RowError as error:
                raise UnreadableError(_describe_bad_array(content, number, error)) from error
            rows = value if isinstance(value, list) else [value]
            for number, row in enumerate(rows, start=1):
                yield f", item {number}", _as_row(row)
            return
        try:
            row = _as_row(_parse_json(line.rstrip(b"\r\n"), is_line=True))
        except RowError as error:
            row = error
        yield f", line {number}", row


def _parse_json(text: bytes | bytearray, *, is_line: bool = False) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise RowError("too deeply nested JSON.") from error
    except UnicodeDecodeError as error:
        raise RowError(
            f"not UTF-8 text, byte {error.start} is {text[error.start]:#04x}."
        ) from error
    except json.JSONDecodeError as error:
        line = "" if is_line else f"line {error.lineno}, "
        raise RowError(f"not valid JSON: {error.msg}, {line}column {error.colno}.") from error
    except ValueError as error:  # a number of thousands of digits
        raise RowError(f"not valid JSON: {error}.") from error


def _describe_bad_array(line: bytes, number: int, error: RowError) -> str:
    """Return why a file is no JSON array: each line is one, as its first line, or the error."""
    try:
        return f", line {number}: {_as_row(_parse_json(line))}"
    except RowError:
        return f": {error}"


def _as_row(value: Any) -> Row | RowError:
    if isinstance(value, dict):
        return value
    shown = json.dumps(value, ensure_ascii=False)[:40]
    return RowError(f'an object such as {{"text": ...}} is needed, not {shown}')


def _json_columns(file: Path) -> list[str]:
    rows = islice(_read_json(file, None, None), HEAD_ROWS)
    return list(dict.fromkeys(name for _, row in rows if isinstance(row, dict) for name in row))


def _read_csv(file: Path, columns: Columns, text_column: str | None) -> PlacedRows:
    """Yield the rows of a table, whose first row has the names of the columns.

    The place of a row is the line where it begins: quoted text may have line endings of its own.
    """
    table = _open_csv(file)
    header = _header(table)
    for name in columns or ():
        if header.count(name) > 1:
            raise UnreadableError(f": has several columns {name!r}.")
    while True:
        begin = table.line_num + 1
        try:
            values = next(table)
        except StopIteration:
            return
        except csv.Error as error:
            yield f", line {begin}", RowError(f"no sound CSV: {error}.")
            continue
        if len(values) == len(header):
            yield f", line {begin}", dict(zip(header, map(with_newlines, values), strict=True))
        elif values:  # not an empty line
            yield (
                f", line {begin}",
                RowError(
                    f"has {len(values)} fields, but the first row names {len(header)}; a field "
                    "with a separator or a line ending in it must be in double quotes."
                ),
            )


def _open_csv(file: Path) -> Any:
    """Return a reader of `csv` for a file, with the separator of its first line."""
    csv.field_size_limit(MAX_ROW_BYTES)
    lines = _csv_lines(file)
    first = next(lines, "")
    return csv.reader(chain([first], lines), delimiter=_delimiter(file, first), strict=True)


def _header(table: Any) -> list[str]:
    """Return the names of the columns, the first row of a table that is not empty."""
    try:
        return next(([name.strip() for name in row] for row in table if row), [])
    except csv.Error as error:
        raise UnreadableError(f", line 1: no sound CSV: {error}.") from error


def _csv_lines(file: Path) -> Iterator[str]:
    for number, line in read_lines(file):
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise UnreadableError(
                f", line {number}: not UTF-8 text, byte {error.start} is {line[error.start]:#04x}; "
                "save the table as UTF-8."
            ) from error


def _delimiter(file: Path, header: str) -> str:
    """Return the separator of a table: the most frequent one in its first line."""
    is_tsv = ".tsv" in (suffix.lower() for suffix in file.suffixes)
    return "\t" if is_tsv else max((",", "\t", ";"), key=header.count)


def _csv_columns(file: Path) -> list[str]:
    return _header(_open_csv(file))


_READERS: dict[str, Callable[[Path, Columns, str | None], PlacedRows]] = {
    "text": _read_text, "jsonl": _read_json, "csv": _read_csv, "parquet": parquet_rows,
    "arrow": arrow_rows,
}  # fmt: skip
"""Type -> function that yields the place in a file and the needed columns of every row."""

_COLUMNS: dict[str, Callable[[Path], list[str]]] = {
    "text": lambda file: [TEXT_COLUMN], "jsonl": _json_columns, "csv": _csv_columns,
    "parquet": parquet_columns, "arrow": arrow_columns,
}  # fmt: skip
"""Type -> function that returns the names of the columns of a file."""
