"""Durations in Slurm's notation, limited to the forms that YAML and Slurm read alike."""

import re
from collections.abc import Iterator

_DURATION = re.compile(r"(?:(\d+)-)?(\d+):([0-5]?\d):([0-5]?\d)")


def seconds(text: str) -> int:
    """Convert `4:00:00` or `1-12:00:00` (days-hours:minutes:seconds) to seconds.

    The caller must have checked the form with `duration_fault`.
    """
    match = _DURATION.fullmatch(text)
    assert match, text
    days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def duration_fault(where: str, text: str | None) -> Iterator[str]:
    """Yield one message if `text` is neither null nor such a duration.

    Bare numbers are refused: Slurm reads them as minutes, and YAML turns an unquoted 4:00:00 into
    a number.
    """
    if text is not None and not _DURATION.fullmatch(text):
        allowed = "hours:minutes:seconds, such as 4:00:00, or days-hours:minutes:seconds"
        yield f"{where}={text}: must be {allowed}; in a recipe, put it in quotes."
