"""Open one source of any kind: built in, files, or a data set of the hub."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hqqtrain.common.errors import UserError
from hqqtrain.config.groups import AUTO, BUILT_IN_SOURCES, DataConfig
from hqqtrain.data.examples import Example
from hqqtrain.data.files import FILE_TYPE_BY_EXTENSION, find_files, format_extension
from hqqtrain.data.formats import text
from hqqtrain.data.formats.format import Format
from hqqtrain.data.formats.registry import DEFAULT_TEXT_FIELD, choose_format, fits
from hqqtrain.data.hub import (
    HubRows,
    has_held_out,
    load_hub_dataset,
    select_hub_split,
    stream_hub_dataset,
)
from hqqtrain.data.readers import TEXT_COLUMN, FileRows
from hqqtrain.data.row_examples import RowExamples
from hqqtrain.data.rows import Rows
from hqqtrain.data.splits import HELD_OUT_SPLITS, TRAIN
from hqqtrain.data.stdlib import stdlib_texts
from hqqtrain.data.stdlib_chat import stdlib_conversations

_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True)
class SourceTexts:
    """The examples of a source; each part may be iterated several times.

    Attributes:
        train: The examples to train on; all of them if the source has no split.
        held_out: The examples that the source itself holds out; None if it has no split.
    """

    train: Iterable[Example]
    held_out: Iterable[Example] | None


def open_source(
    source: str,
    data: DataConfig,
    key: str,
    *,
    warns: bool = True,
    evaluates: bool = False,
    held_out_splits: Sequence[str] = HELD_OUT_SPLITS,
) -> SourceTexts:
    """Open a source of any kind.

    Args:
        source: A value of `data.source` or `eval.source`.
        data: The group `data` of the configuration, which says what the rows and files are.
        key: The config key that contains `source`, for messages.
        warns: Whether to log which files are not read.
        evaluates: Whether only the held-out texts are needed, or all if none are.
        held_out_splits: The names of splits, the first of which that exists is held out.

    Raises:
        UserError: The source cannot be found, has no files or splits of the kind, or its rows have
            no format.
    """
    where = f"{key}={source}"
    if source in BUILT_IN_SOURCES:
        return SourceTexts(*(_built_in(source, split) for split in ("train", "held_out")))

    def examples(rows: Rows, kind: str) -> RowExamples:
        format = _format_of(rows, data, where, is_own=key == "data.source")
        return RowExamples(rows, format, where, data.max_bad_rows, kind)

    if not is_hub_name(source):
        files = find_files(
            source, data.file_type, key, warns=warns, held_out_splits=held_out_splits
        )
        if not files.train and not evaluates:
            raise UserError(
                f"{where}: no file to train on; by its name, {files.held_out[0]} is held-out text. "
                "Rename it, or give the file itself."
            )
        of_train, of_held_out = (
            examples(FileRows(part, files.file_type, where), kind) if part else None
            for part, kind in ((files.train, "rows"), (files.held_out, "held-out rows"))
        )
        return SourceTexts(of_train or [], of_held_out)
    is_streamed = data.streaming and key == "data.source"
    splits = (stream_hub_dataset if is_streamed else load_hub_dataset)(source, key)
    has_both = not evaluates and has_held_out(splits)
    names = [held_out_splits] if evaluates else [(TRAIN,), *[held_out_splits] * has_both]
    train, *held_out = (
        examples(
            HubRows(select_hub_split(splits, each, source, key), where),
            "held-out rows" if each is held_out_splits else "rows",
        )
        for each in names
    )
    return SourceTexts(train, held_out[0] if held_out else None)


def _built_in(source: str, split: str) -> list[Example]:
    """Return the examples of `split`, `train` or `held_out`, of a source that is built in."""
    if source == "python_stdlib_chat":
        return list(stdlib_conversations(split))
    return [content for _, content in stdlib_texts(split)]


def _format_of(rows: Rows, data: DataConfig, where: str, *, is_own: bool) -> Format:
    """Return the format of rows.

    Args:
        rows: The rows.
        data: The group `data` of the configuration.
        where: `key=source` for messages.
        is_own: Whether the rows are those of `data.source`, which `data.format` describes. For
            others it holds if it fits them, and so does `data.text_field`.

    Raises:
        UserError: The rows do not have the format.
    """
    if isinstance(rows, FileRows) and rows.file_type == text.NAME:
        if data.format not in (AUTO, text.NAME) and is_own:
            raise UserError(
                f"data.format={data.format}: {where} has files of plain text, which have no "
                "columns; use auto, or set data.file_type to the type of the files."
            )
        return text.text_format(TEXT_COLUMN)
    name, field = data.format, data.text_field
    if not is_own:
        name = name if name != AUTO and fits(rows, name, field) else AUTO
        field = field if fits(rows, text.NAME, field) else DEFAULT_TEXT_FIELD
    return choose_format(rows, name, field, where)


def is_hub_name(source: str) -> bool:
    """Whether `source` is the name of a hub data set: neither an existing path nor like a path.

    A source is like a path if it has the extension of a text file, or if its folder exists.
    """
    try:
        path = Path(source).expanduser()
        has_known_extension = format_extension(path) in FILE_TYPE_BY_EXTENSION
        if path.exists() or has_known_extension or not _HUB_NAME.fullmatch(source):
            return False
        return path.parent == Path() or not path.parent.exists()
    except (OSError, ValueError, RuntimeError):  # no such user in ~user, or too long a name
        return False
