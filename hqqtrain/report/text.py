"""Text of users and models that goes into a page or a plot.

Names and texts may contain anything: markup, control characters, halves of a surrogate pair.
"""

import re
import unicodedata
from html import escape
from typing import Any

_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
"""Characters that XML or UTF-8 does not allow, and other control characters except \\t and \\n.

Those that change the direction of text could show one name as another.
"""

_HIDDEN_CATEGORIES = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
"""Unicode categories of characters that show nothing, or that control what is shown."""

_SHOWN = "\n\t\u200c\u200d"
"""Members of these categories that text needs: letters and emoji are joined by the last two."""


def printable(text: str) -> str:
    """Return `text` with a replacement character for each one that cannot be shown."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def escape_controls(text: str) -> str:
    """Return `text` with hidden and control characters escaped as in Python: `\\x1b`, `\\u202e`.

    Line endings (LF) and tabs stay. A backslash of the text is doubled where it could be taken for
    a part of an escape sequence.
    """
    pieces = [_escape_control(character) for character in text]
    for index, piece in enumerate(pieces):
        following = pieces[index + 1][0] if index + 1 < len(pieces) else ""
        if piece == "\\" and following in ("", "\\", "x", "u", "U"):
            pieces[index] = "\\\\"
    return "".join(pieces)


def _escape_control(character: str) -> str:
    if character in _SHOWN or unicodedata.category(character) not in _HIDDEN_CATEGORIES:
        return character
    code = ord(character)
    return (
        f"\\x{code:02x}"
        if code < 256
        else (f"\\u{code:04x}" if code < 1 << 16 else f"\\U{code:08x}")
    )


def escape_html(text: str) -> str:
    """Return `text` as HTML that shows it, in an element or in a quoted attribute."""
    return escape(printable(text))


def format_number(value: Any) -> str:
    """Format a number for people: thousands separators, and four significant digits of a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
