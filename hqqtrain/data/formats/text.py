"""Plain text: one column has the text of a row, and every token of it is trained."""

from collections.abc import Iterable

from hqqtrain.data.formats.format import Format, check_text
from hqqtrain.data.rows import Row

NAME, NEEDS = "text", "text"

USUAL_COLUMNS = (
    "text", "content", "contents", "document", "raw_content", "page_content", "article", "passage",
    "story", "code", "markdown",
)  # fmt: skip
"""Names of the only column of text that need no `data.text_field`."""


def text_format(column: str) -> Format:
    """Return the format of rows whose text is in `column`. Rows in which it is null are left out.

    Args:
        column: Name of the column.
    """
    name = f"data.text_field={column}"

    def parse(row: Row) -> str | None:
        value = row.get(column)
        return None if value is None else check_text(value, name)

    return Format(NAME, (column,), parse, text_column=column)


def only_text_column(rows: Iterable[Row]) -> str | None:
    """Return the column that holds text in these rows, if it is the only one and has a usual name.

    Numbers that are written as text, as in CSV files, are no text.
    """
    columns = {name for row in rows for name, value in row.items() if _is_text(value)}
    if len(columns) != 1:
        return None
    (column,) = columns
    return column if column.lower() in USUAL_COLUMNS else None


def _is_text(value: object) -> bool:
    if not isinstance(value, str) or not value.strip():
        return False
    try:
        float(value)
    except ValueError:
        return True
    return False
