"""Use the standard library of the running interpreter as text that every user has.

With it the default recipe works without network access. Modules are split into training and
held-out ones by a hash of their *name*. So the split is the same on every machine and in every
Python version, and `scripts/pretrain_tiny.py` never trains the bundled model on held-out modules.
"""

import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

HELD_OUT_SHARE = 10
"""One module in this many is held out."""

# Excluded because it is not code that a programmer wrote for readers (tests, data tables, generated
# files), or because some distributions or later Python versions do not contain it.
_EXCLUDED = frozenset(
    {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib"}
    | {"lib2to3", "ensurepip", "turtledemo", "pydoc_data", "encodings", "distutils", "msilib"}
)


def is_held_out(module: str) -> bool:
    """Whether `module`, a dotted name such as `json.decoder`, is held out for evaluation."""
    digest = hashlib.sha256(module.encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_SHARE == 0


def stdlib_modules() -> Iterator[tuple[str, Path]]:
    """Yield dotted name and file of every module written in Python, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = ((_module_name(path.relative_to(root)), path) for path in root.rglob("*.py"))
    yield from sorted((name, path) for name, path in found if name)


def stdlib_texts(split: str) -> Iterator[tuple[str, str]]:
    """Yield dotted name and source text of the modules of `split`: `train` or `held_out`."""
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
    if parts[0].startswith("_sysconfigdata"):
        return ""
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
