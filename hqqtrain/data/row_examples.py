"""Turn the rows of a source into examples, and count the rows that cannot be used."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from hqqtrain.common.errors import UserError
from hqqtrain.common.text import count
from hqqtrain.data.examples import Example, has_empty_answer
from hqqtrain.data.formats import text
from hqqtrain.data.formats.format import Format
from hqqtrain.data.formats.registry import no_such_column
from hqqtrain.data.held_out import is_blank
from hqqtrain.data.readers import FileRows
from hqqtrain.data.rows import Row, RowError, Rows

logger = logging.getLogger(__name__)

SHOWN_BAD_ROWS = 5


class Position(NamedTuple):
    """A position in the rows of a source: after some rows of a file.

    Attributes:
        file: Index of the file; 0 if the rows are not in files.
        row: Number of the rows of that file before the position.
        bad_rows: Number of bad rows of the source before the position.
    """

    file: int = 0
    row: int = 0
    bad_rows: int = 0


BEGINNING = Position()
"""The position before the first row."""


class RowCounts(NamedTuple):
    """Numbers of rows of a source that are unusual.

    Attributes:
        bad: Rows that are left out because they cannot be read.
        blank: Rows without text, which are left out, too.
        empty_answers: Rows with an answer without a word; see `has_empty_answer`.
    """

    bad: int = 0
    blank: int = 0
    empty_answers: int = 0


class RowExamples:
    """The examples of rows, in order. Every iteration reads the rows again.

    Rows without text are left out, as are up to `max_bad_rows` rows that do not fit the format.

    Args:
        rows: The rows of files or of a hub data set.
        format: Their format.
        where: `key=source` for messages, such as `data.source=texts`.
        max_bad_rows: Largest number of rows that may be bad.
        kind: What the rows are, for the log: `rows` or `held-out rows`.

    Attributes:
        counts: What the last iteration over all rows has counted.
    """

    def __init__(
        self, rows: Rows, format: Format, where: str, max_bad_rows: int = 0, kind: str = "rows"
    ) -> None:
        self._rows, self._format, self._where = rows, format, where
        self._max_bad_rows, self._kind = max_bad_rows, kind
        self._number, self.counts = 0, RowCounts()

    def __length_hint__(self) -> int:
        """Return the number of examples; 0 before they were read once."""
        return self._number

    def __iter__(self) -> Iterator[Example]:
        """Yield the examples; see `read`."""
        return (example for _, example in self.read())

    def read(self, start: Position = BEGINNING) -> Iterator[tuple[Position, Example]]:
        """Yield the examples from a position on, each with the position after it.

        Files before the position are not read. The rows before it in its file are read, but they
        are not parsed.

        Raises:
            UserError: A file cannot be read, too many rows are bad, or no row has any text.
        """
        rows = examples = blanks = empty = 0
        bad_rows, bad = start.bad_rows, list[str]()
        first_skipped = ""
        for file, number, (place, row) in self._rows_from(start):
            rows += 1
            try:
                example = self._parse(row)
            except RowError as error:
                bad_rows += 1
                bad.append(f"{place}: {str(error).rstrip('.')}")
                del bad[SHOWN_BAD_ROWS:]
                if bad_rows > self._max_bad_rows:
                    raise self._bad_row_error(place, error, bad) from error
                continue
            if example is None:
                first_skipped = first_skipped or place
                continue
            examples += 1
            if isinstance(example, str) or blanks == examples - 1:  # text of chats takes time
                blanks += is_blank(example)
            empty += has_empty_answer(example)
            placed = example if isinstance(example, str) else replace(example, place=place)
            yield Position(file, number, bad_rows), placed
        if start != BEGINNING:
            return  # what was before it is unknown
        if blanks == examples:
            raise self._no_text_error(has_text=examples > 0, bad=bad)
        self._number, skipped = examples, rows - examples - bad_rows
        self.counts = RowCounts(bad_rows, skipped + blanks, empty)
        self._log(rows, skipped, first_skipped, bad_rows, bad)
        if empty:
            _log_once(
                logging.WARNING,
                f"{self._where}: {empty} of {rows} rows have an answer without a word, of which "
                "only the end is trained",
            )

    def _rows_from(self, start: Position) -> Iterator[tuple[int, int, tuple[str, Row | RowError]]]:
        """Yield the index of the file, the number of the row in it, and the row with its place."""
        rows = self._rows
        files: list[Rows] = [*rows.single_files()] if isinstance(rows, FileRows) else [rows]
        for file in range(start.file, len(files)):
            skipped = start.row if file == start.file else 0
            found = files[file].read(self._format.columns, self._format.text_column)
            for number, row in enumerate(islice(found, skipped, None), start=skipped + 1):
                yield file, number, row

    def _parse(self, row: Row | RowError) -> Example | None:
        if isinstance(row, RowError):
            raise row
        return self._format.parse(row)

    def describe_format(self) -> str:
        """Return the format with the columns that it reads, as `chat (messages)`."""
        columns = "" if self._is_text_files else f" ({', '.join(self._format.columns)})"
        return f"{self._format.name}{columns}"

    @property
    def is_plain_text(self) -> bool:
        """Whether the examples are plain texts."""
        return self._format.name == text.NAME

    @property
    def files(self) -> list[Path]:
        """The files of the rows, if they are in files."""
        return self._rows.files if isinstance(self._rows, FileRows) else []

    @property
    def _is_text_files(self) -> bool:
        """Whether each row is a file of plain text."""
        return isinstance(self._rows, FileRows) and self._rows.file_type == text.NAME

    def _log(
        self, rows: int, skipped: int, first_skipped: str, bad_rows: int, bad: list[str]
    ) -> None:
        """Log what was read, and what was not; each line once, because rows are read again."""
        noun = self._kind.replace("rows", "files") if self._is_text_files else self._kind
        noun = noun.removesuffix("s") if rows == 1 else noun
        _log_once(logging.INFO, f"{self._where}: {rows:,} {noun} of {self.describe_format()}.")
        if skipped:
            _log_once(
                logging.WARNING,
                f"{self._where}: {skipped} of {rows} rows have no text in "
                f"'{self._format.text_column}' and are skipped, such as {first_skipped}",
            )
        if bad:
            _log_once(
                logging.WARNING,
                f"{self._where}: {bad_rows} of {rows} rows cannot be read and are left out "
                f"(data.max_bad_rows={self._max_bad_rows}), such as {'; '.join(bad)}.",
            )

    def _bad_row_error(self, place: str, error: RowError, bad: list[str]) -> UserError:
        """Return the error for one bad row too many."""
        limit = f"data.max_bad_rows={self._max_bad_rows}"
        if not self._max_bad_rows:
            reason = str(error).rstrip(".")
            return UserError(
                f"{self._where}: cannot read {place}: {reason}. To leave out bad rows, set "
                "data.max_bad_rows."
            )
        return UserError(
            f"{self._where}: more than {count(self._max_bad_rows, 'row')} cannot be read "
            f"({limit}), such as {'; '.join(bad)}."
        )

    def _no_text_error(self, *, has_text: bool, bad: list[str]) -> UserError:
        """Return the error for rows none of which has text."""
        column = self._format.text_column
        if isinstance(self._rows, FileRows) and self._rows.is_empty():
            return UserError(f"{self._where}: no text in it; every file is empty.")
        if bad:
            return UserError(f"{self._where}: no row can be read, such as {'; '.join(bad)}.")
        columns = self._rows.column_names()
        if column is None:
            return UserError(f"{self._where}: no text in it; it has no row of text.")
        if self._is_text_files:
            return UserError(f"{self._where}: no text in it; every row is empty.")
        if has_text or column in columns:
            return UserError(f"{self._where}: no text in it; every row of '{column}' is empty.")
        if not columns:
            return UserError(f"{self._where}: no text in it; it has no row with a field.")
        return no_such_column(column, columns, self._where)


@cache
def _log_once(level: int, message: str) -> None:
    logger.log(level, "%s", message)
