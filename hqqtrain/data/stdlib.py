"""The text every user already has: the running interpreter's standard library.

It makes the default recipe work without a network. Modules are split into train and
held-out by a hash of their *name*, so the split is the same on every machine and Python
version, and `scripts/pretrain_tiny.py` can keep the held-out ones away from the bundled
model for good.
"""

import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

HELD_OUT_SHARE = 10
"""One module in this many is held out."""

# Not prose of programmers: tests, tables of data, files the build generates, and packages
# that some distributions strip or later Pythons drop.
_EXCLUDED = frozenset(
    {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib"}
    | {"lib2to3", "ensurepip", "turtledemo", "pydoc_data", "encodings", "distutils", "msilib"}
)


def is_held_out(module: str) -> bool:
    """True where `module`, a dotted name such as `json.decoder`, is kept for evaluation."""
    digest = hashlib.sha256(module.encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_SHARE == 0


def stdlib_modules() -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of every standard-library module in Python, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = ((_module_name(path.relative_to(root)), path) for path in root.rglob("*.py"))
    yield from sorted((name, path) for name, path in found if name)


def stdlib_texts(split: str) -> Iterator[tuple[str, str]]:
    """(dotted name, source text) of the modules of `split`, `train` or `held_out`."""
    for name, path in stdlib_modules():
        if is_held_out(name) == (split == "held_out"):
            text = path.read_text(encoding="utf-8", errors="replace")
            if text.strip():
                yield name, text


def _module_name(relative: Path) -> str:
    """`json/decoder.py` -> `json.decoder`; empty for what is not a module of the library."""
    parts = relative.with_suffix("").parts
    if _EXCLUDED & set(parts) or parts[0] not in sys.stdlib_module_names:
        return ""
    if parts[0].startswith("_sysconfigdata"):
        return ""
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
