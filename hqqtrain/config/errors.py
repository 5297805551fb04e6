"""The one exception that means "the user can fix this": shown as a message, exit code 2."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A fault in the configuration or the data: names the key or file, the value, the fix."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the closest of `known`, or an empty string."""
    close = get_close_matches(word, list(known), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""
