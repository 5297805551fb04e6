"""Exceptions that the command line shows as a message, without a traceback."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """An error in the user's configuration or data.

    The message names the key or file, its value, what is allowed, and the fix. Exit code 2.
    """


class RankLostError(RuntimeError):
    """Another rank failed or disappeared.

    The message says which rank and, if known, why. Exit code 1.
    """


class PreemptedError(RuntimeError):
    """The run was asked to stop.

    The message says by whom. The error is raised on all ranks. Exit code 3.
    """


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the closest of `known`, or an empty string."""
    close = get_close_matches(word, list(known), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""
