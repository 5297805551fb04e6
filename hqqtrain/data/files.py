"""Find the text files that a source names, and sort them into a training and a held-out part."""

import logging
from dataclasses import dataclass
from pathlib import Path

from hqqtrain.common.errors import UserError, did_you_mean
from hqqtrain.data.splits import (
    HELD_OUT_SPLITS,
    TRAIN,
    split_files,
    split_of_name,
    split_of_path,
)

logger = logging.getLogger(__name__)

FORMAT_BY_EXTENSION = {
    ".txt": "text", ".md": "text", ".py": "text", ".rst": "text", ".text": "text",
    ".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet",
}  # fmt: skip
"""The format of a file by its extension, for `data.format=auto`."""

TABLE_EXTENSIONS = (".csv", ".tsv", ".xlsx", ".xls", ".ods")
"""Tables that other programs write. As text, their numbers and commas would be trained on."""

_CONVERT_TABLE = (
    ' A table must be converted first, for example: python -c "from pyarrow import csv, parquet; '
    "parquet.write_table(csv.read_csv('a.csv'), 'a.parquet')\"; data.text_field names its column."
)
"""The advice for a table, which continues a message."""

COMPRESSIONS = (".gz", ".bz2", ".zst")
"""Extensions of compressed files, which follow the extension of a format, as in `a.jsonl.gz`."""

SOURCE_TREE_EXTENSIONS = (".py", ".md", ".rst")
"""Extensions of source code and its documents, whose names say what they are about."""

_HIDDEN = (".", "__pycache__")
"""Beginnings of the names of files and folders that are hidden, or caches of Python."""

MAX_UNTRAINED = 1 / 3
"""Largest share of the bytes of a folder that names may keep out of the training, unwarned."""


@dataclass(frozen=True)
class SourceFiles:
    """The files of a source.

    Attributes:
        train: The files to train on.
        held_out: The files that are held out by their names.
        format: The format of all files: `text`, `jsonl` or `parquet`.
    """

    train: list[Path]
    held_out: list[Path]
    format: str


def find_files(source: str, format: str, key: str, *, warns: bool = True) -> SourceFiles:
    """Find the file `source`, or the files below the folder `source` in sorted order.

    Hidden files are left out. Names of files and folders decide the split, as in `datasets`: if
    some are named after the training split, files without a split are left out, too. In a tree of
    source code they decide nothing.

    Args:
        source: Path of the file or folder. The name of a single file does not matter.
        format: `auto`, `text`, `jsonl` or `parquet`.
        key: The config key that contains `source`, for messages.
        warns: Whether to log which files are not read.

    Raises:
        UserError: The path is missing or unreadable, has no file of the format, or has files of
            several formats.
    """
    path, where = _existing_path(source, key), f"{key}={source}"
    if path.is_file():
        return SourceFiles([path], [], _format_of(path, where) if format == "auto" else format)
    if not path.is_dir():
        raise UserError(f"{where}: is neither a file nor a folder; write its text to a file.")
    all_files, links = _list_folder(path, where)
    if warns and links:
        logger.warning(
            "%s: %d linked folders are not read, such as %s; link or give the files.",
            where, len(links), links[0].relative_to(path),
        )  # fmt: skip
    extensions = {
        extension
        for extension, its_format in FORMAT_BY_EXTENSION.items()
        if format in ("auto", its_format)
    }
    files = [file for file in all_files if format_extension(file) in extensions]
    if not files:
        contents = ", ".join(sorted({p.suffix or p.name for p in all_files})[:20]) or "nothing"
        allowed = ", ".join(sorted(extensions))
        tables = {format_extension(file) for file in all_files} & set(TABLE_EXTENSIONS)
        raise UserError(
            f"{where}: no file to read; the folder contains {contents}; allowed extensions "
            f"are {allowed}.{_CONVERT_TABLE if tables else ''}"
        )
    if warns and len(files) < len(all_files):
        other = next(file for file in all_files if format_extension(file) not in extensions)
        logger.warning(
            "%s: %d of %d files are read; the others have other extensions, such as %s.",
            where, len(files), len(all_files), other.relative_to(path),
        )  # fmt: skip
    common_format = _common_format(files, where)
    return _by_split(files, path, common_format, where if warns else None)


def _list_folder(folder: Path, where: str) -> tuple[list[Path], list[Path]]:
    """Return the files below a folder, and the links to other folders, without hidden ones."""
    files, links, folders = [], [], [folder]
    try:
        while folders:
            for path in folders.pop().iterdir():
                if path.name.startswith(_HIDDEN):
                    continue
                if not path.is_dir():
                    files.append(path)
                elif path.is_symlink():
                    links.append(path)
                else:
                    folders.append(path)
    except OSError as error:  # also of a folder inside: its texts would be missing without a word
        raise UserError(f"{where}: {error.filename} cannot be read: {error.strerror}.") from error
    return sorted(files), sorted(links)


def format_extension(file: Path) -> str:
    """Return the extension that tells the format, in lower case: `.jsonl` of `a.jsonl.gz`."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if len(suffixes) > 1 and suffixes[-1] in COMPRESSIONS:
        return suffixes[-2]
    return suffixes[-1] if suffixes else ""


def suggest_similar_name(path: Path) -> str:
    """Return ` Did you mean ...?` with the most similar name in the folder of `path`, or ''."""
    parent = path.parent
    try:
        return did_you_mean(path.name, [p.name for p in parent.iterdir()])
    except OSError:
        return ""


def _existing_path(source: str, key: str) -> Path:
    """Return the path that `source` names; refuse one that does not exist."""
    if not source.strip():
        raise UserError(f"{key}={source}: is empty; give a file, a folder or a hub name.")
    try:
        path = Path(source).expanduser()
        exists = path.exists()
    except (OSError, ValueError, RuntimeError) as error:
        # The name is too long or has a NUL, a folder is not readable, or ~user does not exist.
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{key}={source[:200]}: cannot be read: {reason.rstrip('.')}.") from error
    if not exists:
        raise UserError(f"{key}={source}: no such file or folder.{suggest_similar_name(path)}")
    return path


def _by_split(files: list[Path], root: Path, format: str, where: str | None) -> SourceFiles:
    """Sort the files below `root` by their names, and log what follows if `where` is given."""
    if _is_source_tree(files, root):
        _log_ignored_names(files, root, where)
        return SourceFiles(files, [], format)
    splits = split_files(files, root)
    held_out = next((splits[split] for split in HELD_OUT_SPLITS if split in splits), [])
    train = splits.get(TRAIN) or splits.get(None, [])
    unused = len(files) - len(train) - len(held_out)
    if where and (held_out or unused):
        untrained = 1 - _bytes(train) / max(_bytes(files), 1)
        advice = "; rename files or folders that are no splits" if untrained > MAX_UNTRAINED else ""
        example = f", such as {held_out[0].relative_to(root)}" if held_out else ""
        logger.log(
            logging.WARNING if untrained > MAX_UNTRAINED else logging.INFO,
            "%s: files by their names: for training %d, held out %d%s, not used %d; "
            "%.0f%% of the bytes are not trained on%s.",
            where, len(train), len(held_out), example, unused, 100 * untrained, advice,
        )  # fmt: skip
    return SourceFiles(train, held_out, format)


def _is_source_tree(files: list[Path], root: Path) -> bool:
    """Whether `root` contains source code or documents, in which `train/` is a topic.

    That is so if more than half of the files are. But a folder that consists of folders named after
    splits, as `train/` and `validation/`, is no source tree. A README has no say.
    """
    files = [file for file in files if not file.name.lower().startswith("readme")]
    documents = [file for file in files if format_extension(file) in SOURCE_TREE_EXTENSIONS]
    parts = [file.relative_to(root).parts for file in files]
    top_splits = {split_of_name(names[0]) if len(names) > 1 else None for names in parts}
    is_split = None not in top_splits and TRAIN in top_splits and len(top_splits) > 1
    return 2 * len(documents) > len(files) and not is_split


def _log_ignored_names(files: list[Path], root: Path, where: str | None) -> None:
    """Log the names of splits that decide nothing; warn if they may be held-out text."""
    named = [file for file in files if split_of_path(file, root)]
    # In a source tree, a text file of such a name may be held-out text all the same.
    data = [file for file in named if format_extension(file) not in SOURCE_TREE_EXTENSIONS]
    held_out = [file for file in data if split_of_path(file, root) in HELD_OUT_SPLITS]
    if where and named:
        logger.log(
            logging.WARNING if held_out else logging.INFO,
            "%s: most files are source code or documents (%s), so names such as %s make no "
            "split, and all files are used.",
            where, ", ".join(SOURCE_TREE_EXTENSIONS), (held_out or named)[0].relative_to(root),
        )  # fmt: skip


def _bytes(files: list[Path]) -> int:
    """Return the size of all files that exist; a broken link is reported when it is read."""
    return sum(file.stat().st_size for file in files if file.exists())


def _format_of(file: Path, where: str) -> str:
    """Return the format of a file by its extension; refuse an unknown one."""
    extension = format_extension(file)
    if extension in FORMAT_BY_EXTENSION:
        return FORMAT_BY_EXTENSION[extension]
    is_table = extension in TABLE_EXTENSIONS
    advice = _CONVERT_TABLE if is_table else " Or set data.format=text, jsonl or parquet."
    raise UserError(
        f"{where}: unknown extension '{extension}'; allowed are "
        f"{', '.join(FORMAT_BY_EXTENSION)}, also compressed: {', '.join(COMPRESSIONS)}.{advice}"
    )


def _common_format(files: list[Path], where: str) -> str:
    """Return the format that all files have; refuse files of several formats."""
    formats = sorted({FORMAT_BY_EXTENSION[format_extension(file)] for file in files})
    if len(formats) > 1:
        raise UserError(
            f"{where}: contains files of {' and '.join(formats)}; choose one with data.format."
        )
    return formats[0]
