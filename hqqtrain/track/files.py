"""Files of trackers that are complete or absent, whatever kills the process in between."""

import os
from pathlib import Path


def write_whole(path: Path, content: bytes) -> Path:
    """Writes beside `path`, forces it to the disk and renames it there; returns `path`."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return path
