"""Find, check and read text files on this machine through `datasets`.

`datasets` passes on the errors of its readers: an Arrow error about "row 2", or a codec error that
names no file. So this module looks for the mistakes that a user can make, and names the file. Cheap
checks run before reading, the others after a failure.
"""

import glob
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet

from hqqtrain.common.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)

FORMAT_BY_EXTENSION = {
    ".txt": "text", ".md": "text", ".py": "text", ".rst": "text", ".text": "text",
    ".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet",
}  # fmt: skip
"""The format of a file by its extension, for `data.format=auto`."""

_READERS = {"text": "text", "jsonl": "json", "parquet": "parquet"}
"""The reader of each format, by its name in `datasets`."""


def read_files(source: str, format: str, text_field: str, key: str) -> datasets.Dataset:
    """Read the rows of a file, or of all files below a folder in sorted order.

    A text file becomes one row with one column, `text_field`.

    Args:
        source: Path of the file or folder.
        format: `auto`, `text`, `jsonl` or `parquet`.
        text_field: Name of the column of texts.
        key: The config key that contains `source`, for messages.

    Raises:
        UserError: The path is missing, unreadable, empty, or not of this format.
    """
    files, format = find_files(Path(source).expanduser(), format, key)
    for file in files:
        _check_readable(file, key)
    files = [file for file in files if file.stat().st_size]  # readers fail on empty files
    if not files:
        raise UserError(f"{key}={source}: no text in it; every file is empty.")
    options = {"sample_by": "document"} if format == "text" else {}
    # `datasets` takes patterns, so special characters in file names must be escaped.
    patterns = {"train": [glob.escape(str(file)) for file in files]}
    try:
        with _silence_datasets():
            rows = datasets.load_dataset(
                _READERS[format], data_files=patterns, split="train", **options
            )
        rows.data.validate(full=True)  # find invalid UTF-8 in JSON now, not during training
    except Exception as error:  # readers raise errors of Arrow, codecs and pandas
        # Name the first damaged file; if no check finds one, show the reader's own message.
        reason = next(_describe_file_errors(files, format), f"{source}: {_first_line(error)}")
        raise UserError(f"{key}: cannot read {reason}") from error
    must_rename = format == "text" and text_field != "text"
    return rows.rename_column("text", text_field) if must_rename else rows


def find_files(path: Path, format: str, key: str) -> tuple[list[Path], str]:
    """Return the files to read and their format.

    The files are `path` itself, or all files below it in sorted order, without hidden ones.

    Raises:
        UserError: The path is missing, has no file of the format, or has files of several formats.
    """
    if not path.exists():
        raise UserError(f"{key}={path}: no such file or folder.{suggest_similar_name(path)}")
    if path.is_file():
        return [path], _format_of(path, key) if format == "auto" else format
    all_files = sorted(p for p in path.rglob("*") if p.is_file() and not _is_hidden(p, path))
    extensions = {
        extension
        for extension, its_format in FORMAT_BY_EXTENSION.items()
        if format in ("auto", its_format)
    }
    files = [file for file in all_files if file.suffix.lower() in extensions]
    if not files:
        contents = ", ".join(sorted({p.suffix or p.name for p in all_files})) or "nothing"
        allowed = ", ".join(sorted(extensions))
        raise UserError(
            f"{key}={path}: no file to read; the folder contains {contents}; allowed extensions "
            f"are {allowed}."
        )
    if len(files) < len(all_files):
        logger.warning(
            "%s=%s: %d of %d files are read; the others have other extensions.",
            key, path, len(files), len(all_files),
        )  # fmt: skip
    return files, _common_format(files, path, key)


def suggest_similar_name(path: Path) -> str:
    """Return ` Did you mean ...?` with the most similar name in the folder of `path`, or ''."""
    parent = path.parent
    return did_you_mean(path.name, [p.name for p in parent.iterdir()]) if parent.is_dir() else ""


@contextmanager
def _silence_datasets() -> Iterator[None]:
    """Suppress progress bars and log lines of `datasets`, because our message replaces its own."""
    datasets.disable_progress_bars()
    previous = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(previous)


def _format_of(file: Path, key: str) -> str:
    """Return the format of a file by its extension; refuse an unknown one."""
    if file.suffix.lower() not in FORMAT_BY_EXTENSION:
        raise UserError(
            f"{key}={file}: unknown extension '{file.suffix}'; allowed are "
            f"{', '.join(FORMAT_BY_EXTENSION)}; "
            "or set data.format=text, jsonl or parquet."
        )
    return FORMAT_BY_EXTENSION[file.suffix.lower()]


def _common_format(files: list[Path], folder: Path, key: str) -> str:
    """Return the format that all files have; refuse files of several formats."""
    formats = sorted({FORMAT_BY_EXTENSION[file.suffix.lower()] for file in files})
    if len(formats) > 1:
        raise UserError(
            f"{key}={folder}: contains files of {' and '.join(formats)}; choose one "
            "with data.format."
        )
    return formats[0]


def _is_hidden(path: Path, root: Path) -> bool:
    """Whether a file below `root`, or a folder between them, is hidden or a cache of Python."""
    return any(part.startswith((".", "__pycache__")) for part in path.relative_to(root).parts)


def _check_readable(file: Path, key: str) -> None:
    """Raise UserError if the file cannot be opened."""
    try:
        with file.open("rb") as stream:
            stream.read(1)
    except OSError as error:
        raise UserError(f"{key}: cannot read {file}: {error.strerror}.") from error


def _describe_file_errors(files: list[Path], format: str) -> Iterator[str]:
    """Yield a message for every file that is not of `format`, with its line or byte.

    Each of the functions below returns the message of one file without its name, or ''.
    """
    describe = {
        "text": _describe_text_error, "jsonl": _describe_json_error,
        "parquet": _describe_parquet_error,
    }[format]  # fmt: skip
    for file in files:
        if error := describe(file):
            yield f"{file}{error}"


def _describe_text_error(file: Path) -> str:
    try:
        file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        return f": not UTF-8 text, byte {error.start} is {error.object[error.start]:#04x}."
    return ""


def _describe_parquet_error(file: Path) -> str:
    try:
        pyarrow.parquet.read_schema(file)
    except (pyarrow.ArrowException, OSError) as error:
        return f": not a parquet file: {_first_line(error)}"
    return ""


def _describe_json_error(file: Path) -> str:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1 and line.lstrip().startswith(b"["):
                # The file is one JSON array instead of JSON Lines.
                return _describe_json_value_error(file.read_bytes(), list)
            if line.strip() and (error := _describe_json_value_error(line, dict)):
                return f", line {number}{error}"
    return ""


def _describe_json_value_error(text: bytes, allowed_type: type) -> str:
    try:
        value = json.loads(text)
    except ValueError as error:  # invalid JSON or invalid UTF-8
        return f": not valid JSON: {error}."
    if not isinstance(value, allowed_type):
        return f': an object such as {{"text": ...}} is needed, not {text[:40].decode()!r}.'
    return ""


def _first_line(error: Exception) -> str:
    """Return the first line of an error's message, or of its cause, which says more."""
    cause = error.__cause__ or error
    return str(cause).strip().split("\n")[0] or type(cause).__name__
