"""Use Python's standard library as text that every user has.

With this text, the default recipe works without network access. A hash of a module's *name* decides
whether the module is held out. So the split is the same on every machine and in every version of
Python, and `scripts/pretrain_tiny.py` never trains the bundled model on held-out modules.
"""

import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

MODULES_PER_HELD_OUT = 10
"""One module in this many is held out."""

_NOT_FOR_READERS = frozenset(
    {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"}
    | {"pydoc_data", "encodings"}
)
"""Folders of tests, data and generated files, which a programmer did not write for readers."""

_NOT_EVERYWHERE = frozenset(
    {"idlelib", "lib2to3", "ensurepip", "turtledemo", "distutils", "msilib"}
)
"""Packages that some distributions or later versions of Python do not contain."""

_EXCLUDED = _NOT_FOR_READERS | _NOT_EVERYWHERE


def is_held_out(module: str) -> bool:
    """Whether `module`, a dotted name such as `json.decoder`, is held out for evaluation."""
    digest = hashlib.sha256(module.encode()).digest()
    return int.from_bytes(digest[:4], "big") % MODULES_PER_HELD_OUT == 0


def stdlib_modules() -> Iterator[tuple[str, Path]]:
    """Yield (dotted name, file) of every module written in Python, sorted by name."""
    root, modules = Path(sysconfig.get_paths()["stdlib"]), []
    for folder, subfolders, files in os.walk(root):
        # site-packages alone may have more than 100,000 files.
        subfolders[:] = [name for name in subfolders if name not in _EXCLUDED]
        paths = [Path(folder, file) for file in files if file.endswith(".py")]
        modules += [(_module_name(path.relative_to(root)), path) for path in paths]
    yield from sorted((name, path) for name, path in modules if name)


def stdlib_texts(split: str) -> Iterator[tuple[str, str]]:
    """Yield (dotted name, source text) of the modules of `split`, `train` or `held_out`."""
    for name, path in stdlib_modules():
        if is_held_out(name) == (split == "held_out"):
            text = path.read_text(encoding="utf-8", errors="replace")
            if text.strip():
                yield name, text


def _module_name(relative: Path) -> str:
    """Return `json.decoder` for `json/decoder.py`, or '' for a file to exclude."""
    parts = relative.with_suffix("").parts
    if _EXCLUDED & set(parts) or parts[0] not in sys.stdlib_module_names:
        return ""
    if parts[0].startswith("_sysconfigdata"):  # generated when Python is built
        return ""
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
