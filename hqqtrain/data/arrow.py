"""Read rows of parquet and Arrow files, a few columns and a few rows at a time.

An Arrow table gives all objects of a column the same keys, with nulls for those that an object does
not have. Such nulls are left out again.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from hqqtrain.data.rows import Row, RowError
from hqqtrain.data.text_files import UnreadableError

BATCH_ROWS = 256
"""Rows of a table in memory at a time."""

_TEXT_TYPES = ("string", "large_string", "string_view", "null")


def parquet_rows(
    file: Path, columns: Collection[str] | None, text_column: str | None
) -> Iterator[tuple[str, Row | RowError]]:
    """Yield the place and the needed columns of every row of a parquet file.

    Raises:
        UnreadableError: The file is damaged, or has several columns of a name, or `text_column`
            contains something else than text.
    """
    with _readable("parquet"), pyarrow.parquet.ParquetFile(file) as parquet:
        schema = parquet.schema_arrow
        names = needed_columns(schema, columns, text_column)
        if not names:
            yield from ((f", row {i}", {}) for i in range(1, parquet.metadata.num_rows + 1))
            return
        yield from _numbered(parquet.iter_batches(BATCH_ROWS, columns=names))


def parquet_columns(file: Path) -> list[str]:
    """Return the names of the columns of a parquet file."""
    with _readable("parquet"):
        return list(pyarrow.parquet.read_schema(file).names)


def arrow_rows(
    file: Path, columns: Collection[str] | None, text_column: str | None
) -> Iterator[tuple[str, Row | RowError]]:
    """Yield the place and the needed columns of every row of an Arrow file or stream.

    Raises:
        UnreadableError: As for `parquet_rows`.
    """
    with _readable("Arrow"), _open_arrow(file) as (reader, batches):
        names = needed_columns(reader.schema, columns, text_column)
        parts = (
            batch.select(names).slice(start, BATCH_ROWS)
            for batch in batches
            for start in range(0, batch.num_rows, BATCH_ROWS)
        )
        yield from _numbered(parts)


def arrow_columns(file: Path) -> list[str]:
    """Return the names of the columns of an Arrow file or stream."""
    with _readable("Arrow"), _open_arrow(file) as (reader, _):
        return list(reader.schema.names)


def needed_columns(
    schema: pyarrow.Schema, columns: Collection[str] | None, text_column: str | None
) -> list[str]:
    """Return those of `columns` that a table has.

    Raises:
        UnreadableError: There are several of a name, or `text_column` contains something else.
    """
    names = [name for name in dict.fromkeys(schema.names) if columns is None or name in columns]
    for name in names:
        if schema.names.count(name) > 1:
            key = f"data.text_field={name}" if name == text_column else repr(name)
            raise UnreadableError(f": has several columns {key}.")
    if text_column in names:
        type_ = schema.field(text_column).type
        value_type = type_.value_type if pyarrow.types.is_dictionary(type_) else type_
        if str(value_type) not in _TEXT_TYPES:
            raise UnreadableError(f": data.text_field={text_column} contains {type_}, not text.")
    return names


def rows_of_batch(batch: pyarrow.RecordBatch | pyarrow.Table) -> Iterator[Row]:
    """Yield the rows of a batch."""
    columns = [
        list(map(_without_nulls, values.to_pylist()))
        if pyarrow.types.is_nested(values.type)
        else values.to_pylist()
        for values in batch.columns
    ]
    names = batch.schema.names
    if not names:
        yield from ({} for _ in range(batch.num_rows))
    for values in zip(*columns, strict=True):
        yield dict(zip(names, values, strict=True))


def _numbered(batches: Iterator[pyarrow.RecordBatch]) -> Iterator[tuple[str, Row | RowError]]:
    """Yield the rows of all batches, with their numbers from 1."""
    number = 0
    try:
        for batch in batches:
            for row in rows_of_batch(batch):
                number += 1
                yield f", row {number}", row
    except UnicodeDecodeError as error:
        raise UnreadableError(f", row {number + 1} or later: not UTF-8 text.") from error


def _without_nulls(value: Any) -> Any:
    """Return a nested value without the keys whose value is null."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return list(map(_without_nulls, value)) if isinstance(value, list) else value


@contextmanager
def _open_arrow(file: Path) -> Iterator[tuple[Any, Iterator[pyarrow.RecordBatch]]]:
    """Open a file in either form of Arrow's IPC format; return its reader and its batches."""
    with pyarrow.memory_map(str(file)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        if is_file:
            reader = pyarrow.ipc.open_file(source)
            yield reader, map(reader.get_batch, range(reader.num_record_batches))
        else:
            stream = pyarrow.ipc.open_stream(source)
            yield stream, iter(stream)


@contextmanager
def _readable(kind: str) -> Iterator[None]:
    """Translate the errors of damaged files, of which some are an `OSError` without a code."""
    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UnreadableError(f": not a sound {kind} file: {str(error).strip()[:200]}") from error
