"""Copy the tokenizer and the generation settings of a model next to its new weights.

A model's folder may come from somebody else. A link in it, such as `vocab.txt -> /etc/shadow`, must
not put a private file of this user into a folder that is then shared or uploaded.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

from hqqtrain.common.errors import UserError

ADDITIONAL_TEMPLATES = "additional_chat_templates"
"""The folder with the templates of a tokenizer that has several, such as one for tools."""

GENERATION_CONFIG = "generation_config.json"
"""The file with the generation settings of a model."""

_PATTERNS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model", "chat_template.*", f"{ADDITIONAL_TEMPLATES}/*.jinja", GENERATION_CONFIG,
)  # fmt: skip
"""Files to copy from the source model: tokenizer, chat template and generation settings."""


def companion_files(source: Path, adapter: Path | None = None) -> dict[str, Path]:
    """Return name -> real path of the files in `source` that a saved model needs, too.

    Args:
        source: The folder of the model, or of its tokenizer.
        adapter: The folder of an adapter that is used with the model. Its generation settings take
            precedence, because it may be trained to end its turns with a token that the base does
            not stop at.

    Raises:
        UserError: One of them is a link that leads out of the model's folder, and not to the files
            that the hub's cache keeps for its models.
    """
    files = {}
    for path in sorted({path for pattern in _PATTERNS for path in source.glob(pattern)}):
        if not path.is_file():
            continue
        target = path.resolve()
        if not (target.is_relative_to(source.resolve()) or _is_blob(target)):
            raise UserError(
                f"{path}: is a link to {target}, which is outside of the model's folder, so it is "
                "not copied into the results. Replace the link by a copy of the file, or remove it."
            )
        files[str(path.relative_to(source))] = target
    if adapter:
        files |= {k: v for k, v in companion_files(adapter).items() if k == GENERATION_CONFIG}
    return files


def companion_modes(files: Mapping[str, Path]) -> dict[str, int]:
    """Return the widest permissions of each copy: those of the file, and the owner may write."""
    return {name: path.stat().st_mode & 0o666 | 0o600 for name, path in files.items()}


def copy_companion_files(files: Mapping[str, Path], folder: Path) -> None:
    """Copy the files that `companion_files` has found; links become regular files."""
    for name, path in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / name)


def _is_blob(path: Path) -> bool:
    """Whether `path` is where the hub's cache keeps the files to which its snapshots link."""
    return path.parent.name == "blobs" and path.parent.parent.name.startswith("models--")
