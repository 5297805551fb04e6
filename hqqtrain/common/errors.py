"""Exceptions that are shown as a message: what the user can fix, what befell another rank, and a
wish to stop."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A fault in the configuration or the data: names the key or file, the value, the fix."""


class RankLostError(RuntimeError):
    """Another rank has failed, or is gone: which one, and why where that is known. Exit code 1."""


class PreemptedError(RuntimeError):
    """The run was asked to stop, and by whom. It is raised on all ranks; exit code 3."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the closest of `known`, or an empty string."""
    close = get_close_matches(word, list(known), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""
