"""Times as slurm writes them, and only those that nothing reads otherwise."""

import re
from collections.abc import Iterator

_FORM = re.compile(r"(?:(\d+)-)?(\d+):([0-5]?\d):([0-5]?\d)")


def parse_seconds(text: str) -> int:
    """`4:00:00` or `1-12:00:00` (days-hours:minutes:seconds) in seconds. It must have that form."""
    found = _FORM.fullmatch(text)
    assert found, text
    days, hours, minutes, rest = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def duration_error(where: str, text: str | None) -> Iterator[str]:
    """One sentence where `text` is neither null nor such a time.

    A bare number is refused: slurm takes it for minutes, and YAML makes it of an unquoted 4:00:00.
    """
    if text is not None and not _FORM.fullmatch(text):
        allowed = "hours:minutes:seconds, such as 4:00:00, or days-hours:minutes:seconds"
        yield f"{where}={text}: must be {allowed}; in a recipe in quotes."
