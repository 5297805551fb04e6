"""The files of a result as readers of the Hub get them: without the paths of this machine."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from hqqtrain.common.errors import UserError
from hqqtrain.common.reading import read_json
from hqqtrain.formats.adapter_config import CONFIG
from hqqtrain.formats.manifest import MANIFEST, DamagedError, is_sealed, manifest_of_copy
from hqqtrain.formats.signed_card import CARD, is_signed_card

_SEARCHED_BYTES = 1 << 24
"""Bytes at the beginning of a file that are searched for paths: all of a small file, and the header
of one with weights."""

_BASE_KEYS = ("base_model_name_or_path", "model")
"""Keys by which the adapter_config.json of PEFT and of MLX names the base."""


def result_files(folder: Path, base: str) -> dict[str, Path | bytes]:
    """Return name -> file, or its new content, of a result to push.

    Hidden files, and a card that hqqtrain has written for readers on this machine, are left out.

    Args:
        folder: The folder of a quantized model, an adapter or an export.
        base: The repository that adapters in it name as their base.

    Raises:
        UserError: The folder has a link, which may lead to a private file, or is damaged.
    """
    files: dict[str, Path | bytes] = dict(_regular_files(folder))
    changed = {}
    for name in files:
        if Path(name).name == CONFIG:
            changed[name] = _with_base(folder / name, base)
    if CARD in files and is_signed_card((folder / CARD).read_text("utf-8", errors="replace")):
        del files[CARD]
    if is_sealed(folder):
        try:
            changed[MANIFEST] = manifest_of_copy(folder, changed, "adapter")
        except DamagedError as error:
            raise UserError(f"{error}.") from error
    return files | changed


def check_paths(files: Mapping[str, Path | bytes], private: Iterable[str]) -> None:
    """Check that no file contains a path of this machine, in which a user's name may be.

    Args:
        files: The files to push, by their names.
        private: The paths to look for.

    Raises:
        UserError: A file contains one.
    """
    searched = [(path, path.encode()) for path in private_paths(private)]
    for name, file in files.items():
        content = file if isinstance(file, bytes) else _beginning(file)
        if found := next((path for path, needle in searched if needle in content), None):
            where = name if isinstance(file, bytes) else str(file)
            raise UserError(
                f"{where}: contains {found}, a path of this machine, so it is not pushed. Remove "
                f"the path from the file{'; or delete the file' if name == CARD else ''}, and run "
                "the same command again."
            )


def private_paths(paths: Iterable[str]) -> list[str]:
    """Return the absolute paths among `paths`, and the home, that are long enough to search for.

    A path of one part, such as /root, is also an ordinary word of a tokenizer.
    """
    known = {os.path.abspath(os.path.expanduser(path)) for path in (*paths, "~", os.getcwd())}
    known |= {os.path.realpath(path) for path in known}
    return sorted(path for path in known if len(Path(path).parts) > 2)


def _regular_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield (name, path) of the files below `folder`, without hidden ones."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if any(part.startswith(".") for part in relative.parts):
            continue
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise UserError(f"{path}: is not a regular file; replace it by a copy, or remove it.")
        if path.is_file():
            yield relative.as_posix(), path


def _with_base(path: Path, base: str) -> bytes:
    """Return an adapter_config.json that names a repository as the base."""
    content = read_json(path)
    content |= {key: base for key in _BASE_KEYS if key in content}
    if "revision" in content:
        content["revision"] = None
    return (json.dumps(content, indent=2) + "\n").encode()


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_SEARCHED_BYTES)
