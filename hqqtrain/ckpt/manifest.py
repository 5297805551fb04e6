"""A folder that knows its own contents: one altered or missing byte is noticed before it is used.

Disks and copies do lose bytes, and most lost bytes of a checkpoint would load without a complaint.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from hqqtrain.ckpt.atomic import sync

MANIFEST = "manifest.json"
_BLOCK = 1 << 20


class DamagedError(Exception):
    """A file is missing, or not what it was when it was written: which one."""


def seal(folder: Path) -> None:
    """Writes the sizes and sha256 of all files of `folder` into its manifest.json."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    path = folder / MANIFEST
    path.write_text(_text({file.name: _facts(file) for file in files}), encoding="utf-8")
    sync(path)


def check_sealed(folder: Path) -> None:
    """Reads every byte. Raises DamagedError unless all files are as `seal` has found them."""
    for name, facts in _manifest(folder).items():
        path = folder / name
        try:
            found = _facts(path)
        except OSError as error:
            raise DamagedError(f"{path}: cannot be read ({error.strerror})") from error
        if found != facts:
            raise DamagedError(f"{path}: is not what was written (its checksum differs)")


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        text = path.read_bytes().decode()
        files = json.loads(text)["files"]
        intact = text == _text(files)  # which holds a checksum of itself
    except OSError as error:
        raise DamagedError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise DamagedError(f"{path}: is not what was written")
    return files


def _text(files: dict[str, Any]) -> str:
    listed = json.dumps(files, indent=2, sort_keys=True)
    digest = hashlib.sha256(listed.encode()).hexdigest()
    return json.dumps({"sha256": digest, "files": files}, indent=2, sort_keys=True) + "\n"


def _facts(path: Path) -> dict[str, Any]:
    """{"bytes": size, "sha256": of the contents}."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}
