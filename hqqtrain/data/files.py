"""Find the files that a source names, and sort them into a training and a held-out part."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hqqtrain.common.errors import UserError, did_you_mean
from hqqtrain.common.inputs import is_pattern, matching_files, pattern_root
from hqqtrain.data.splits import (
    HELD_OUT_SPLITS,
    TRAIN,
    split_files,
    split_of_name,
    split_of_path,
)
from hqqtrain.data.text_files import COMPRESSIONS

logger = logging.getLogger(__name__)

FILE_TYPE_BY_EXTENSION = {
    ".txt": "text", ".md": "text", ".py": "text", ".rst": "text", ".text": "text",
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet",
    ".csv": "csv", ".tsv": "csv", ".arrow": "arrow", ".feather": "arrow",
}  # fmt: skip
"""The type of a file by its extension, for `data.file_type=auto`."""

TABLE_TYPES = ("csv", "arrow")
"""Types of files that are left out of a folder that also has files of other types."""

SPREADSHEETS = (".xlsx", ".xls", ".ods")
"""Tables in files that only other programs read."""

_CONVERT_SPREADSHEET = " A spreadsheet must be saved as CSV in UTF-8, whose columns are read."
"""The advice for a spreadsheet, which continues a message."""

SOURCE_TREE_EXTENSIONS = (".py", ".md", ".rst")
"""Extensions of source code and its documents, whose names say what they are about."""

_HIDDEN = (".", "__pycache__")
"""Beginnings of the names of files and folders that are hidden, or caches of Python."""

_ABOUT_DATA = ("LICENSE", "NOTICE", "README")
"""Names of files about the data beside them, which nobody expects to be read."""

MAX_UNTRAINED = 1 / 3
"""Largest share of the bytes of a folder that names may keep out of the training, unwarned."""


@dataclass(frozen=True)
class SourceFiles:
    """The files of a source.

    Attributes:
        train: The files to train on.
        held_out: The files that are held out by their names.
        file_type: The type of all files: `text`, `jsonl`, `csv`, `parquet` or `arrow`.
    """

    train: list[Path]
    held_out: list[Path]
    file_type: str


def find_files(
    source: str,
    file_type: str,
    key: str,
    *,
    warns: bool = True,
    held_out_splits: Sequence[str] = HELD_OUT_SPLITS,
) -> SourceFiles:
    """Find the file `source`, the files below the folder, or those that match the pattern.

    The files are sorted, and hidden ones are left out. Names of files and folders decide the split,
    as in `datasets`: if some are named after the training split, files without a split are left
    out, too. In a tree of source code they decide nothing.

    Args:
        source: Path of the file or folder, or a pattern such as `texts/*.jsonl`. The name of a
            single file does not matter.
        file_type: `auto`, `text`, `jsonl`, `csv`, `parquet` or `arrow`.
        key: The config key that contains `source`, for messages.
        warns: Whether to log which files are not read.
        held_out_splits: The names of splits, the first of which that exists is held out.

    Raises:
        UserError: The path is missing or unreadable, has no file of the type, or has files of
            several types.
    """
    path, where = _existing_path(source, key), f"{key}={source}"
    if path.is_file():
        return SourceFiles([path], [], _type_of(path, where) if file_type == "auto" else file_type)
    if path.is_dir():
        all_files, links = _list_folder(path, where)
        if warns and links:
            logger.warning(
                "%s: %d linked folders are not read, such as %s; link or give the files.",
                where, len(links), links[0].relative_to(path),
            )  # fmt: skip
    elif is_pattern(path):
        all_files, path = matching_files(path), pattern_root(path)
    else:
        raise UserError(f"{where}: is neither a file nor a folder; write its text to a file.")
    files, file_type = _files_of_one_type(all_files, file_type, where)
    others = sorted(f for f in set(all_files) - set(files) if f.stem.upper() not in _ABOUT_DATA)
    if warns and others:
        logger.warning(
            "%s: %d of %d files are read; the others have other extensions, such as %s.",
            where, len(files), len(all_files), others[0].relative_to(path),
        )  # fmt: skip
    return _by_split(files, path, file_type, where if warns else None, held_out_splits)


def _files_of_one_type(files: list[Path], file_type: str, where: str) -> tuple[list[Path], str]:
    """Return the files that are read, and their type.

    Raises:
        UserError: No file has the type, or they have several.
    """
    extensions = {
        extension
        for extension, its_type in FILE_TYPE_BY_EXTENSION.items()
        if file_type in ("auto", its_type)
    }
    by_type: dict[str, list[Path]] = {}
    for file in files:
        if (extension := format_extension(file)) in extensions:
            by_type.setdefault(FILE_TYPE_BY_EXTENSION[extension], []).append(file)
    if not by_type:
        contents = ", ".join(sorted({p.suffix or p.name for p in files})[:20]) or "nothing"
        is_spreadsheet = {format_extension(file) for file in files} & set(SPREADSHEETS)
        raise UserError(
            f"{where}: no file to read; the folder contains {contents}; allowed extensions "
            f"are {', '.join(sorted(extensions))}.{_CONVERT_SPREADSHEET if is_spreadsheet else ''}"
        )
    others = {name for name in by_type if name not in TABLE_TYPES}
    if others:  # tables beside texts are seldom meant to be trained on
        by_type = {name: by_type[name] for name in by_type if name in others}
    if len(by_type) > 1:
        raise UserError(
            f"{where}: contains files of {' and '.join(sorted(by_type))}; choose one with "
            "data.file_type."
        )
    ((file_type, chosen),) = by_type.items()
    return chosen, file_type


def _list_folder(folder: Path, where: str) -> tuple[list[Path], list[Path]]:
    """Return the files below a folder, and the links to other folders, without hidden ones."""
    files, links, folders = [], [], [folder]
    try:
        while folders:
            files_here: list[Path] = []
            for path in folders.pop().iterdir():
                if path.name.startswith(_HIDDEN):
                    continue
                if not path.is_dir():
                    files_here.append(path)
                elif path.is_symlink():
                    links.append(path)
                else:
                    folders.append(path)
            files += _without_files_of_datasets(files_here)
    except OSError as error:  # also of a folder inside: its texts would be missing without a word
        raise UserError(f"{where}: {error.filename} cannot be read: {error.strerror}.") from error
    return sorted(files), sorted(links)


def _without_files_of_datasets(files: list[Path]) -> list[Path]:
    """Return the files of a folder without those that `datasets` keeps beside its data.

    `Dataset.save_to_disk` lists its data in state.json. Files of its cache are copies of the data.
    """
    by_name = {file.name: file for file in files if file.name != "dataset_dict.json"}
    if "dataset_info.json" not in by_name:
        return list(by_name.values())
    try:
        state = json.loads(by_name["state.json"].read_bytes())
        # A file that is missing is an error when it is read.
        return [by_name["state.json"].parent / item["filename"] for item in state["_data_files"]]
    except (KeyError, TypeError, ValueError, OSError):  # the cache of a data set of the hub
        return [
            file
            for name, file in by_name.items()
            if name not in ("dataset_info.json", "state.json") and not name.startswith("cache-")
        ]


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
    if not exists and is_pattern(path):
        if not matching_files(path):
            raise UserError(f"{key}={source}: no file matches this pattern.")
    elif not exists:
        raise UserError(f"{key}={source}: no such file or folder.{suggest_similar_name(path)}")
    return path


def _by_split(
    files: list[Path], root: Path, file_type: str, where: str | None, held_out_splits: Sequence[str]
) -> SourceFiles:
    """Sort the files below `root` by their names, and log what follows if `where` is given."""
    if _is_source_tree(files, root):
        _log_ignored_names(files, root, where)
        return SourceFiles(files, [], file_type)
    splits = split_files(files, root)
    held_out = next((splits[split] for split in held_out_splits if split in splits), [])
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
    return SourceFiles(train, held_out, file_type)


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


def _type_of(file: Path, where: str) -> str:
    """Return the type of a file by its extension; refuse an unknown one."""
    extension = format_extension(file)
    if extension in FILE_TYPE_BY_EXTENSION:
        return FILE_TYPE_BY_EXTENSION[extension]
    types = ", ".join(dict.fromkeys(FILE_TYPE_BY_EXTENSION.values()))
    advice = f" Or set data.file_type to one of {types}."
    raise UserError(
        f"{where}: unknown extension '{extension}'; allowed are "
        f"{', '.join(FILE_TYPE_BY_EXTENSION)}; text, JSON and CSV files also compressed: "
        f"{', '.join(COMPRESSIONS)}.{_CONVERT_SPREADSHEET if extension in SPREADSHEETS else advice}"
    )
