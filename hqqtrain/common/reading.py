"""Read small files that a run has left, in bounded time and memory, whatever they contain now.

Anybody may have edited such a file or put another one in its place. A FIFO would block the reader
for ever, and a large or deeply nested file would exhaust its memory or its stack.
"""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 1 << 24
"""Largest JSON file that is read; the largest that we write has a number for every layer."""


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: The file cannot be read, or is no regular file.
        ValueError: The file has more than `max_bytes` bytes.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(path))
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"is larger than {max_bytes} bytes")
    return content


def load_json(path: Path) -> Any:
    """Return the value in a JSON file.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is not JSON, too large, or too deeply nested.
    """
    return parse_json(read_bounded(path, MAX_JSON_BYTES))


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: The text is not JSON, or too deeply nested.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in the file at `path`; an empty one if the file has none."""
    try:
        content = load_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
