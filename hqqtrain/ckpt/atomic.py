"""Write folders and JSON files completely or not at all, even if the process is killed."""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hqqtrain.config.atomic import atomic_write, partial_of, sync


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `path` that replaces `path` on success.

    On an exception the temporary folder is removed and `path` stays as it was. Leftovers of an
    earlier, killed process are removed first, so only one process may write to `path` at a time.
    """
    path = Path(path)
    temporary, old = partial_of(path), path.with_name(f".{path.name}.old")
    path.parent.mkdir(parents=True, exist_ok=True)
    _recover(path, old)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        _sync_tree(temporary)
        if path.exists():  # a folder that is not empty cannot be replaced by a single rename
            path.rename(old)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        _recover(path, old)
        raise
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def atomic_write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON.

    Raises:
        ValueError: `value` contains NaN or infinity, which JSON does not have.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    atomic_write(path, text + "\n")


def without_nonfinite(value: Any) -> Any:
    """Return a copy of a JSON value in which NaN and infinity are None."""
    if isinstance(value, dict):
        return {k: without_nonfinite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_nonfinite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _recover(path: Path, old: Path) -> None:
    """Restore the old folder after a process was killed between the two renames of a swap."""
    if old.exists() and not path.exists():
        old.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    """Flush a folder to disk and apply the umask to its files, which safetensors makes private."""
    mode = folder.stat().st_mode & 0o666  # the umask itself can only be read by changing it
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
        sync(path)
    sync(folder)
