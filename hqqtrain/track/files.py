"""Files of this package that a reader never sees half written."""

import os
from pathlib import Path


def write(path: Path, content: bytes) -> Path:
    """Complete or absent: written beside, forced to the disk, renamed."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return path
