"""The files that a path of the configuration stands for, whose digest identifies an input.

A model's folder often contains copies of the same weights in other formats, and a downloader's own
files. Nothing reads these, so they do not count.
"""

import glob
from pathlib import Path

from hqqtrain.common.packed_folders import GGUF_SUFFIX, HQQ_PICKLE

_MODEL_PATTERNS = (
    "*.json", "*.safetensors", "tokenizer*", "*.model", "*.jinja", "vocab.*", "merges.txt",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
"""Files of a model's folder that this program or its tokenizer may read."""

_IF_NO_SAFETENSORS = (HQQ_PICKLE, f"*{GGUF_SUFFIX}")
"""Files with the weights of a folder without safetensors files."""

_OTHER_FORMATS = ("consolidated*", "*.fp16*")

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""The files of a PEFT adapter that decide what it computes."""


def model_files(folder: Path) -> list[str]:
    """Return the names of a model's files; for a run's directory, of its base and its adapter."""
    packed = folder / "quantized"
    adapter = [f"adapter/{name}" for name in adapter_files(folder / "adapter")]
    if (packed / "config.json").is_file():
        return [f"quantized/{name}" for name in model_files(packed)] + adapter
    if adapter and not (folder / "config.json").is_file():  # a run that has quantized nothing
        return adapter
    files = {path for pattern in _MODEL_PATTERNS for path in folder.glob(pattern)}
    if not any(path.suffix == ".safetensors" for path in files):
        files |= {path for pattern in _IF_NO_SAFETENSORS for path in folder.glob(pattern)}
    left_out = {path for pattern in _OTHER_FORMATS for path in folder.glob(pattern)}
    found = (p for p in files - left_out if p.is_file() and not p.name.startswith("."))
    return sorted(str(path.relative_to(folder)) for path in found)


def adapter_files(folder: Path) -> list[str]:
    """Return the names of those of `ADAPTER_FILES` that exist in `folder`."""
    return [name for name in ADAPTER_FILES if (folder / name).is_file()]


def text_files(folder: Path) -> list[str]:
    """Return the relative names of all files below `folder` that are not hidden."""
    relative = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(str(p) for p in relative if not any(part.startswith(".") for part in p.parts))


def is_pattern(path: Path) -> bool:
    """Whether a path that does not exist is a pattern of names, such as `texts/*.jsonl`."""
    return any(map(glob.has_magic, path.parts))


def pattern_root(pattern: Path) -> Path:
    """Return the folder below which all files of a pattern are."""
    parts = pattern.parts
    first = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:first])


def matching_files(pattern: Path) -> list[Path]:
    """Return the files that match a pattern, sorted, without hidden ones; `**` is any folders."""
    found = map(Path, glob.glob(str(pattern), recursive=True))
    return sorted(path for path in found if path.is_file())
