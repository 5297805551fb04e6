"""Model cards that end with a checksum, so that an edited card is recognized, and kept."""

import hashlib
import re

CARD = "README.md"
"""The file of a model card."""

_LINE = "<!-- Written by hqqtrain, which keeps an edited card: {} -->\n"

_SIGNATURE = re.compile(_LINE.format(r"(\w{16})") + r"\Z")


def signed_card(text: str) -> str:
    """Return a card with its checksum at the end, in a comment."""
    return text + _LINE.format(_checksum(text))


def is_signed_card(text: str) -> bool:
    """Whether hqqtrain has written a card, and nobody has edited it since."""
    match = _SIGNATURE.search(text)
    return match is not None and _checksum(text[: match.start()]) == match[1]


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
