"""Files of text on this machine: found, checked, and read through `datasets`.

`datasets` reports bad input in the words of its readers (an Arrow error about "row 2", a
codec error without a file). So everything a user can get wrong is looked for by name: before
reading where that is cheap, after a failure where it is not.
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

ENDINGS = {
    ".txt": "text", ".md": "text", ".py": "text", ".rst": "text", ".text": "text",
    ".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet",
}  # fmt: skip
"""What `data.format=auto` makes of a file's ending."""

_READERS = {"text": "text", "jsonl": "json", "parquet": "parquet"}


def read_files(source: str, format: str, text_field: str, key: str) -> datasets.Dataset:
    """The rows of a file, or of all files under a folder in sorted order.

    A text file is one row of one column, `text_field`. `key` is the config key that named
    `source`. Raises UserError for a path that is missing, unreadable, empty or not what
    `format` says.
    """
    files, format = find_files(Path(source).expanduser(), format, key)
    for file in files:
        _check_readable(file, key)
    files = [file for file in files if file.stat().st_size]
    if not files:
        raise UserError(f"{key}={source}: no text in it; every file is empty.")
    options = {"sample_by": "document"} if format == "text" else {}
    paths = {"train": [glob.escape(str(file)) for file in files]}  # a name is no pattern
    try:
        with _silenced():
            rows = datasets.load_dataset(
                _READERS[format], data_files=paths, split="train", **options
            )
        rows.data.validate(full=True)  # JSON with bad UTF-8 is found here, not half-way through
    except Exception as error:  # readers raise what they like: Arrow, codec, pandas errors
        fault = next(_faults(files, format), f"{source}: {_first_line(error)}")
        raise UserError(f"{key}: cannot read {fault}") from error
    renamed = format == "text" and text_field != "text"
    return rows.rename_column("text", text_field) if renamed else rows


def find_files(path: Path, format: str, key: str) -> tuple[list[Path], str]:
    """(files, format): `path` itself or what lies under it, hidden files left out, sorted."""
    if not path.exists():
        raise UserError(f"{key}={path}: no such file or folder.{nearest_names(path)}")
    if path.is_file():
        return [path], _format_of(path, key) if format == "auto" else format
    found = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p, path))
    wanted = {ending for ending, of in ENDINGS.items() if format in ("auto", of)}
    kept = [p for p in found if p.suffix.lower() in wanted]
    if not kept:
        held = ", ".join(sorted({p.suffix or p.name for p in found})) or "nothing"
        allowed = ", ".join(sorted(wanted))
        raise UserError(f"{key}={path}: no file to read; it holds {held}; allowed are {allowed}.")
    if len(kept) < len(found):
        logger.warning("%s=%s: %d of %d files are read, the others have other endings.",
                       key, path, len(kept), len(found))  # fmt: skip
    return kept, _one_format(kept, path, key)


def nearest_names(path: Path) -> str:
    """` Did you mean ...?` with the name beside `path` that is most like it, or nothing."""
    parent = path.parent
    return did_you_mean(path.name, [p.name for p in parent.iterdir()]) if parent.is_dir() else ""


@contextmanager
def _silenced() -> Iterator[None]:
    """No bars, and no log lines beside the one message that a fault becomes."""
    datasets.disable_progress_bars()
    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before)


def _format_of(file: Path, key: str) -> str:
    if file.suffix.lower() not in ENDINGS:
        raise UserError(
            f"{key}={file}: unknown ending '{file.suffix}'; allowed are {', '.join(ENDINGS)}; "
            "or say what it is with data.format=text, jsonl or parquet."
        )
    return ENDINGS[file.suffix.lower()]


def _one_format(files: list[Path], folder: Path, key: str) -> str:
    formats = sorted({ENDINGS[file.suffix.lower()] for file in files})
    if len(formats) > 1:
        raise UserError(
            f"{key}={folder}: holds files of {' and '.join(formats)}; choose with data.format."
        )
    return formats[0]


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith((".", "__pycache__")) for part in path.relative_to(root).parts)


def _check_readable(file: Path, key: str) -> None:
    try:
        with file.open("rb") as stream:
            stream.read(1)
    except OSError as error:
        raise UserError(f"{key}: cannot read {file}: {error.strerror}.") from error


def _faults(files: list[Path], format: str) -> Iterator[str]:
    """Sentences about the files a reader stumbled over, each naming file and line or byte."""
    check = {"text": _text_fault, "jsonl": _json_fault, "parquet": _parquet_fault}[format]
    for file in files:
        if fault := check(file):
            yield f"{file}{fault}"


def _text_fault(file: Path) -> str:
    try:
        file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        return f": not UTF-8 text, byte {error.start} is {error.object[error.start]:#04x}."
    return ""


def _parquet_fault(file: Path) -> str:
    try:
        pyarrow.parquet.read_schema(file)
    except (pyarrow.ArrowException, OSError) as error:
        return f": no parquet file: {_first_line(error)}"
    return ""


def _json_fault(file: Path) -> str:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1 and line.lstrip().startswith(b"["):
                return _json_line_fault(file.read_bytes(), list)  # one array, not JSON Lines
            if line.strip() and (fault := _json_line_fault(line, dict)):
                return f", line {number}{fault}"
    return ""


def _json_line_fault(text: bytes, kind: type) -> str:
    try:
        value = json.loads(text)
    except ValueError as error:  # bad JSON and bad UTF-8 alike
        return f": no valid JSON: {error}."
    if not isinstance(value, kind):
        return f': an object such as {{"text": ...}} is needed, not {text[:40].decode()!r}.'
    return ""


def _first_line(error: Exception) -> str:
    cause = error.__cause__ or error
    return str(cause).strip().split("\n")[0] or type(cause).__name__
