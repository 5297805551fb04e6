"""Read one field of every row of text, JSON and parquet files.

Only the field that was asked for is read, so no other column can be an obstacle. Rows are streamed:
a file of any size needs the memory of one row, or of one batch of parquet. Every error names the
file and the line or row.
"""

import io
import json
import logging
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from hqqtrain.common.errors import UserError, did_you_mean
from hqqtrain.data.files import COMPRESSIONS

logger = logging.getLogger(__name__)

MAX_ROW_BYTES = 1 << 28
"""Longest line of a JSON Lines file. A longer one is no row, and would exhaust the memory."""

MAX_DECOMPRESSED_BYTES = 1 << 30
"""Most bytes of a compressed text, or of a compressed JSON array, which are read at once."""

_BLOCK_BYTES = 1 << 24

_PARQUET_ROWS = 256
"""Rows of a parquet file in memory at a time."""

_PARQUET_TEXT = ("string", "large_string", "string_view")


class UnreadableError(ValueError):
    """A file cannot be read. The message continues the name of the file."""


class FileTexts:
    """The texts of a field in several files, in order. Every iteration reads the files again.

    Rows without the field are skipped, as are those in which it is null.

    Args:
        files: The files; empty ones are allowed.
        format: Their format: `text`, `jsonl` or `parquet`.
        field: The field of JSON and parquet rows that contains the text.
        where: `key=source` for messages, such as `data.source=texts`.
    """

    def __init__(self, files: list[Path], format: str, field: str, where: str) -> None:
        self._files, self._format, self._field, self._where = files, format, field, where

    def __iter__(self) -> Iterator[str]:
        """Yield the texts.

        Raises:
            UserError: A file cannot be read, a row has something else than text, or no row has any.
        """
        rows = texts = 0
        first_skipped, is_blank = "", True
        for file in self._files:
            for place, value in self._read(file):
                rows += 1
                if value is None:
                    first_skipped = first_skipped or f"{file}{place}"
                    continue
                texts += 1
                is_blank = is_blank and not value.strip()
                yield value
        if is_blank:
            raise self._no_text_error(has_field=texts > 0)
        if texts < rows:
            _warn_once(
                f"{self._where}: {rows - texts} of {rows} rows have no text in '{self._field}' and "
                f"are skipped, such as {first_skipped}"
            )

    def _read(self, file: Path) -> Iterator[tuple[str, str | None]]:
        """Yield the place in the file and the text of every row; None for a row without text."""
        try:
            if file.stat().st_size == 0:
                return
            for place, value in _READERS[self._format](file, self._field):
                if value is not None:
                    _check_text(value, place, self._field)
                yield place, value
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"{self._where}: cannot read {file}: {reason}.") from error
        except UnreadableError as error:
            raise UserError(f"{self._where}: cannot read {file}{error}") from error

    def _no_text_error(self, *, has_field: bool) -> UserError:
        """Return the error for files none of whose rows has text."""
        if not any(file.stat().st_size for file in self._files):
            return UserError(f"{self._where}: no text in it; every file is empty.")
        fields = _fields(self._files, self._format)
        if self._format == "text" or has_field or self._field in fields:
            of = "" if self._format == "text" else f" of '{self._field}'"
            return UserError(f"{self._where}: no text in it; every row{of} is empty.")
        if not fields:
            return UserError(f"{self._where}: no text in it; it has no row with a field.")
        return _no_such_field(self._field, fields, self._where)


@cache
def _warn_once(message: str) -> None:
    """Log a warning; texts are read several times, as training text and as held-out text."""
    logger.warning(message)


def _no_such_field(field: str, fields: list[str], where: str) -> UserError:
    """Return the error for rows that have other fields only."""
    return UserError(
        f"data.text_field={field}: {where} has no such column; it has "
        f"{', '.join(fields[:50])}.{did_you_mean(field, fields)}"
    )


def _fields(files: list[Path], format: str) -> list[str]:
    """Return the fields that the first rows of the files have."""
    names: dict[str, None] = {}
    for file in files[:10]:
        if format == "parquet":
            names |= dict.fromkeys(pyarrow.parquet.read_schema(file).names)
        elif format == "jsonl":
            for _, row in islice(_json_rows(file), 100):
                names |= dict.fromkeys(row)
    return list(names)


def _check_text(value: Any, place: str, field: str) -> None:
    """Refuse a value that is not text."""
    if not isinstance(value, str):
        kinds = {bool: "a boolean", int: "a number", float: "a number", list: "a list"}
        kind = kinds.get(type(value), "an object" if isinstance(value, dict) else "binary")
        shown = repr(value)
        shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
        raise UnreadableError(
            f"{place}: data.text_field={field} is {kind} there, not text: {shown}"
        )
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON may escape half of a UTF-16 pair
            raise UnreadableError(
                f"{place}: data.text_field={field} has {value[error.start]!a}, which is no "
                "character, but half of one in UTF-16."
            ) from error


def _read_text(file: Path, field: str) -> Iterator[tuple[str, str]]:
    """Yield the whole file as one text, with every line ending as a newline."""
    content = _read_all(file)
    encoding = json.detect_encoding(content[:4])  # by the byte order mark, or by bytes of 0
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        # The name of the encoding that was expected: "UTF-8 text" also if there is a mark.
        expected = encoding.upper().removesuffix("-SIG")
        raise UnreadableError(
            f": not {expected} text, byte {error.start} is {error.object[error.start]:#04x}."
        ) from error
    yield "", text.replace("\r\n", "\n").replace("\r", "\n")


def _read_json(file: Path, field: str) -> Iterator[tuple[str, Any]]:
    """Yield the place and the field of every row."""
    for place, row in _json_rows(file):
        yield place, row.get(field)


def _json_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and the object of every row: of JSON Lines, or of one array of objects."""
    is_first = True
    for number, line in _lines(file):
        if not line.strip():
            continue
        # A file may be one JSON value over several lines instead of one row per line.
        is_array = is_first and line.lstrip().startswith(b"[")
        is_first = False
        if is_array or line.strip() == b"{":
            value = _parse_json(_read_all(file), "")
            rows = value if isinstance(value, list) else [value]
            for number, row in enumerate(rows, start=1):
                yield f", item {number}", _as_object(row, f", item {number}")
            return
        place = f", line {number}"
        yield place, _as_object(_parse_json(line, place), place)


def _parse_json(text: bytes | bytearray, place: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise UnreadableError(f"{place}: too deeply nested JSON.") from error
    except UnicodeDecodeError as error:
        raise UnreadableError(
            f"{place}: not UTF-8 text, byte {error.start} is {text[error.start]:#04x}."
        ) from error
    except json.JSONDecodeError as error:
        column = f"column {error.colno}" if place else f"line {error.lineno}, column {error.colno}"
        raise UnreadableError(f"{place}: not valid JSON: {error.msg}, {column}.") from error
    except ValueError as error:  # a number of thousands of digits
        raise UnreadableError(f"{place}: not valid JSON: {error}.") from error


def _as_object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        shown = json.dumps(value, ensure_ascii=False)[:40]
        raise UnreadableError(f'{place}: an object such as {{"text": ...}} is needed, not {shown}')
    return value


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (number from 1, line) in UTF-8, for any line ending and any Unicode encoding."""
    with _open(file) as stream:
        start = bytes(stream.peek(4)[:4])
        encoding = json.detect_encoding(start)
        if not encoding.startswith("utf-8"):
            try:
                lines = _read_all(file).decode(encoding).encode().splitlines()
            except UnicodeError as error:
                raise UnreadableError(f": not {encoding.upper()} text: {error}.") from error
            yield from enumerate(lines, start=1)
            return
        if encoding == "utf-8-sig":
            stream.read(3)  # the byte order mark
        number = 0
        while block := stream.readline(MAX_ROW_BYTES):
            if len(block) == MAX_ROW_BYTES:
                raise UnreadableError(
                    f", line {number + 1}: longer than {MAX_ROW_BYTES >> 20} MiB; JSON Lines have "
                    "one row per line."
                )
            for line in block.splitlines():  # a block has several lines if they end with CR
                number += 1
                yield number, line


def _read_parquet(file: Path, field: str) -> Iterator[tuple[str, Any]]:
    """Yield the place and the field of every row."""
    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            schema = parquet.schema_arrow
            if field not in schema.names:
                rows = range(1, parquet.metadata.num_rows + 1)
                yield from ((f", row {row}", None) for row in rows)
                return
            if schema.names.count(field) > 1:
                raise UnreadableError(f": has several columns data.text_field={field}.")
            type_ = schema.field(field).type
            if pyarrow.types.is_dictionary(type_):
                type_ = type_.value_type
            if str(type_) not in (*_PARQUET_TEXT, "null"):
                raise UnreadableError(f": data.text_field={field} contains {type_}, not text.")
            row = 0
            for batch in parquet.iter_batches(_PARQUET_ROWS, columns=[field]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield f", row {row}", value
    except pyarrow.ArrowException as error:
        raise UnreadableError(f": not a sound parquet file: {str(error).strip()[:200]}") from error
    except UnicodeDecodeError as error:
        raise UnreadableError(f", row {row + 1} or later: not UTF-8 text.") from error


def _read_all(file: Path) -> bytearray:
    """Return the content of a file. A few compressed bytes may stand for more than the memory."""
    content = bytearray()
    with _open(file) as stream:
        while block := stream.read(_BLOCK_BYTES):
            content += block
            if len(content) > MAX_DECOMPRESSED_BYTES and file.suffix.lower() in COMPRESSIONS:
                raise UnreadableError(
                    f": more than {MAX_DECOMPRESSED_BYTES >> 20} MiB when decompressed, which are "
                    "read at once; split it into several files, or use JSON Lines."
                )
    return content


def _open(file: Path) -> io.BufferedReader:
    """Open a file, which is decompressed if its extension says so."""
    if file.suffix.lower() not in COMPRESSIONS:
        return file.open("rb")
    compression = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}[file.suffix.lower()]
    return io.BufferedReader(pyarrow.input_stream(str(file), compression=compression))


_READERS: dict[str, Callable[[Path, str], Iterator[tuple[str, Any]]]] = {
    "text": _read_text, "jsonl": _read_json, "parquet": _read_parquet,
}  # fmt: skip
"""Format -> function that yields the place in a file and the field of every row."""
