"""Text of messages: numbers with a noun, and names that cannot steer the terminal."""

import re

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters but tabs and line endings, and those that change the direction of text."""


def count(number: int, noun: str) -> str:
    """Return `1 step` or `2 steps`, with commas in large numbers."""
    plural = f"{noun}es" if noun.endswith(("ss", "sh", "ch", "x")) else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def format_bytes(size: int) -> str:
    """Return `1.50 GiB`, or `3.20 MiB` below 0.1 GiB."""
    gib = size / 2**30
    return f"{short(gib)} GiB" if gib >= 0.1 else f"{short(size / 2**20)} MiB"


def short(number: float) -> str:
    """Return `number` with two decimals, or with two significant digits below 0.1."""
    return f"{number:.2f}" if abs(number) >= 0.1 else f"{number:.2g}"


def escape_terminal(text: str) -> str:
    """Return `text` with control characters escaped as in Python: `\\x1b`, `\\u202e`.

    A message quotes names of files, which somebody else may have chosen to move the cursor.
    """
    return _CONTROLS.sub(lambda match: ascii(match[0])[1:-1], text)
