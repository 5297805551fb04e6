"""Find the format of a source, by its name or by the columns of its first rows."""

from collections.abc import Callable, Collection

from hqqtrain.common.errors import UserError, did_you_mean
from hqqtrain.config.groups import AUTO, DataConfig
from hqqtrain.data.formats import alpaca, chat, completion, text, tokens
from hqqtrain.data.formats.format import Format
from hqqtrain.data.formats.tool_calls import TOOL_COLUMNS
from hqqtrain.data.rows import Rows

FORMATS: dict[str, Callable[[Collection[str]], Format | None]] = {
    chat.NAME: chat.match, alpaca.NAME: alpaca.match, completion.NAME: completion.match,
    tokens.NAME: tokens.match,
}  # fmt: skip
"""Name -> function that returns the format, if the columns have it. `text` needs a column's name.

The order is that of the detection. Text is found before tokens, which may be of another tokenizer.
"""

NEEDS = {module.NAME: module.NEEDS for module in (text, chat, alpaca, completion, tokens)}
"""Name -> the columns that a format needs, for messages."""

_MEDIA = ("image", "images", "audio", "audios", "video", "videos")

_UNSUPPORTED = (
    (
        {"chosen", "rejected"},
        "preference pairs",
        " To train on the chosen answers, rename the column chosen: to messages if it has whole "
        "chats, to completion if it only answers the column prompt, or to text.",
    ),
    (
        {"preferred_output", "non_preferred_output"},
        "preference pairs",
        " To train on the preferred answers, write rows with one list of messages: those of input "
        "and of preferred_output.",
    ),
    (
        {"prompt", "completion", "label"},
        "completions with a rating",
        " To train on the good ones, keep the rows whose label is true, and remove the column "
        "label.",
    ),
    (
        {"prompt", "completions", "labels"},
        "steps with ratings",
        " To train on whole answers, join the completions of each row in a column completion.",
    ),
    *(({name}, "images, audio or video", "") for name in _MEDIA),
)
"""Columns, what rows with all of them are, which training on the next token cannot use, and how to
make other rows of them."""

_KNOWN_COLUMNS = frozenset({
    *chat.MESSAGE_COLUMNS, chat.SYSTEM, *TOOL_COLUMNS, alpaca.INSTRUCTION, *alpaca.INPUT_COLUMNS,
    *alpaca.OUTPUT_COLUMNS, completion.PROMPT, completion.COMPLETION, tokens.INPUT_IDS,
    tokens.LABELS, "chosen", "rejected", "preferred_output", "non_preferred_output", "label",
    "completions", *_MEDIA,
})  # fmt: skip
"""Columns whose values in the first rows matter: a column of nulls or empty lists is none."""

DEFAULT_TEXT_FIELD = DataConfig().text_field


def choose_format(rows: Rows, name: str, text_field: str, where: str) -> Format:
    """Return the format of rows: the one that is named, or the one that their columns have.

    Args:
        rows: The rows.
        name: `data.format`.
        text_field: `data.text_field`.
        where: `key=source` for messages.

    Raises:
        UserError: The rows lack the columns of the format, or are of a kind that is not supported.
    """
    columns = rows.column_names()
    if name == text.NAME:
        return text.text_format(_text_column(rows, columns, text_field))
    if name != AUTO:
        found = FORMATS[name](columns)
        if found is None:
            raise UserError(
                f"data.format={name}: {where} lacks the columns {NEEDS[name]}; it has "
                f"{_listed(columns)}. Use the format of the rows, or auto."
            )
        return found
    if text_field != DEFAULT_TEXT_FIELD:
        return text.text_format(text_field)  # a column that was named, or the error without it
    filled = _filled(rows, columns, text_field)
    # If nothing is filled, the columns tell at least how the rows are meant.
    if found := detect_format(filled or columns, text_field, where):
        return found
    return text.text_format(_text_column(rows, columns, text_field))


def fits(rows: Rows, name: str, text_field: str) -> bool:
    """Whether rows have the columns of a format."""
    columns = rows.column_names()
    return text_field in columns if name == text.NAME else FORMATS[name](columns) is not None


def detect_format(columns: Collection[str], text_field: str, where: str) -> Format | None:
    """Return the format that the columns of rows have; None if they have none.

    Args:
        columns: The columns that are not null in all of the first rows.
        text_field: `data.text_field`.
        where: `key=source` for messages.

    Raises:
        UserError: The columns are those of a kind of rows that is not supported.
    """
    matching = {name: found for name, match in FORMATS.items() if (found := match(columns))}
    has_text = text_field in columns
    for unsupported, kind, advice in _UNSUPPORTED:
        # Columns beside a text do not matter, unless it may be the text of these columns.
        if unsupported <= set(columns) and (matching or not has_text):
            usable = [*matching, *([text.NAME] if has_text else [])]
            hint = f" To use its other columns, set data.format={'|'.join(usable)}."
            raise UserError(
                f"{where}: has {kind} ({', '.join(sorted(unsupported))}), which are not supported; "
                f"{describe_formats()}.{advice}{hint if usable else ''}"
            )
    if has_text:
        matching.pop(tokens.NAME, None)
        return next(iter(matching.values()), text.text_format(text_field))
    return next(iter(matching.values()), None)


def describe_formats() -> str:
    """Return the formats with their columns, for a message."""
    return "supported are " + "; ".join(f"{name} ({needs})" for name, needs in NEEDS.items())


def no_such_column(field: str, columns: list[str], where: str) -> UserError:
    """Return the error for rows that have other columns only."""
    similar = did_you_mean(field, filter(str.isprintable, columns))
    return UserError(
        f"data.text_field={field}: {where} has no such column; it has {_listed(columns)}.{similar} "
        f"By their columns, {describe_formats()}. Name a column of text with data.text_field, or "
        "rename the columns, such as question to prompt and answer to completion."
    )


def _listed(columns: list[str]) -> str:
    """Return the names of columns for a message. A name may have control characters."""
    return ", ".join(n if n.isprintable() else repr(n) for n in columns[:50]) or "none"


def _text_column(rows: Rows, columns: list[str], text_field: str) -> str:
    """Return `data.text_field`, or the only column of text if the default names no column."""
    if text_field in columns or text_field != DEFAULT_TEXT_FIELD:
        return text_field
    return text.only_text_column(rows.head(None)) or text_field


def _filled(rows: Rows, columns: list[str], text_field: str) -> list[str]:
    """Return the columns without those that are empty in all of the first rows.

    Only the columns that matter for the format are looked at. Messages that are plain text are no
    chat.
    """
    known = [name for name in columns if name in _KNOWN_COLUMNS]
    if not known or known == [text_field]:
        return columns
    first = rows.head(known)
    return [
        name
        for name in columns
        if name not in known or any(_is_filled(name, row.get(name)) for row in first)
    ]


def _is_filled(name: str, value: object) -> bool:
    if name in chat.MESSAGE_COLUMNS and isinstance(value, str):
        return value.lstrip().startswith(("[", "{"))
    return value is not None and value != []
