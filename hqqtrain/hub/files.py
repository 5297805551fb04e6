"""The files of a result as readers of the Hub get them: nothing else of its folder, and no private
paths or secrets of this machine.
"""

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path

from huggingface_hub import get_token

from hqqtrain.common.errors import UserError
from hqqtrain.common.reading import read_json
from hqqtrain.common.secrets import environment_secrets
from hqqtrain.common.text import count
from hqqtrain.formats.adapter_config import CONFIG
from hqqtrain.formats.manifest import (
    MANIFEST,
    DamagedError,
    is_sealed,
    manifest_of_copy,
    sealed_names,
)
from hqqtrain.formats.signed_card import CARD, is_signed_card

logger = logging.getLogger(__name__)

_RESULT_FILES = re.compile(
    r"""
    (?:adapter/)? (?:
        (?:adapter_)?model(?:-\d+-of-\d+)?\.safetensors
      | (?:adapter_)?model\.safetensors\.index\.json
      | adapters\.safetensors | [^/]+\.gguf | Modelfile
      | (?:adapter_|generation_|(?:\w+_)?processor_)?config\.json | manifest\.json
      | tokenizer(?:_config)?\.[\w.]+ | tekken\.json | special_tokens_map\.json | added_tokens\.json
      | [\w-]*vocab[\w-]*\.(?:json|txt) | merges\.txt | [\w.-]+\.(?:model|tiktoken|jinja)
      | chat_template\.json | additional_chat_templates/[^/]+\.jinja
      | README\.md | (?i:license|notice|copying|use_policy)[^/]*
    )
    """,
    re.VERBOSE,
)
"""Matches the files of a model, an adapter, a tokenizer and their cards.

The folder of a result may have more: checkpoints of a Trainer, its optimizer, a file with a key.
"""

WEIGHTS_SUFFIXES = (".safetensors", ".gguf")
"""The endings of the names of files with weights. Pickles are never pushed."""

_SEARCHED_BYTES = 1 << 24
"""Bytes at the beginning of a file that are searched for paths and secrets: all of a small file,
and the header of one with weights."""

_BASE_KEYS = ("base_model_name_or_path", "model")
"""Keys by which the adapter_config.json of PEFT and of MLX names the base."""


def result_files(folder: Path, base: str) -> dict[str, Path | bytes]:
    """Return name -> file, or its new content, of a result to push.

    A file that hqqtrain has not sealed, and that has no name of a part of a model or an adapter, is
    left out with a warning. Hidden files, and a card that hqqtrain has written for readers on this
    machine, are left out without one.

    Args:
        folder: The folder of a quantized model, an adapter or an export.
        base: The repository that adapters in it name as their base.

    Raises:
        UserError: The folder has a link, which may lead to a private file, or is damaged.
    """
    found = dict(_regular_files(folder))
    sealed = _sealed_names(folder)
    files: dict[str, Path | bytes] = {
        name: path
        for name, path in found.items()
        if name in sealed or _RESULT_FILES.fullmatch(name)
    }
    if others := found.keys() - files.keys():
        logger.warning(
            "%s: %s is not pushed, because it is no part of a model or an adapter%s",
            folder, min(others),
            f"; nor are {count(len(others) - 1, 'more file')}" * (len(others) > 1),
        )  # fmt: skip
    changed = {}
    for name in files:
        if Path(name).name == CONFIG:
            changed[name] = _with_base(folder / name, base)
    if CARD in files and is_signed_card((folder / CARD).read_text("utf-8", errors="replace")):
        del files[CARD]
    if sealed:
        listed = [name for name in files if not name.startswith("adapter/")]
        changed[MANIFEST] = manifest_of_copy(folder, changed, listed)
    return files | changed


def _sealed_names(folder: Path) -> Set[str]:
    """Return the names of the files that hqqtrain has sealed in a folder; none if it is not sealed.

    Raises:
        UserError: The manifest is damaged.
    """
    try:
        return sealed_names(folder) if is_sealed(folder) else set()
    except DamagedError as error:
        raise UserError(f"{error}.") from error


def check_private(files: Mapping[str, Path | bytes], paths: Iterable[str]) -> None:
    """Check that no file contains a secret, or a path of this machine with maybe a user's name.

    Secrets are the token of the Hub, and environment variables that are named like one.

    Args:
        files: The files to push, by their names.
        paths: The paths to look for.

    Raises:
        UserError: A file contains one.
    """
    searched = {f"{path}, a path of this machine": path for path in private_paths(paths)}
    searched |= {f"the value of {name}": value for name, value in environment_secrets().items()}
    searched |= {"the token of the Hub": token} if (token := get_token()) else {}
    for name, file in files.items():
        content = file if isinstance(file, bytes) else _beginning(file)
        if found := next((what for what, text in searched.items() if _has(content, text)), None):
            where = name if isinstance(file, bytes) else str(file)
            raise UserError(
                f"{where}: contains {found}, so it is not pushed. Remove it from the file"
                f"{'; or delete the file' if name == CARD else ''}, and run the same command again."
            )


def _has(content: bytes, text: str) -> bool:
    """Whether a file contains a text, as it is or as JSON writes it."""
    return any(form.encode() in content for form in {text, json.dumps(text)[1:-1]})


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
