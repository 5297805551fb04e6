"""Text of users and models that goes into a page or a plot.

Names and texts may contain anything: markup, control characters, halves of a surrogate pair.
"""

import re
from html import escape
from typing import Any

_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
"""Characters that XML or UTF-8 does not allow, and other control characters except \\t and \\n.

Those that change the direction of text could show one name as another.
"""


def printable(text: str) -> str:
    """Return `text` with a replacement character for each one that cannot be shown."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def escape_html(text: str) -> str:
    """Return `text` as HTML that shows it, in an element or in a quoted attribute."""
    return escape(printable(text))


def format_number(value: Any) -> str:
    """Format a number for people: thousands separators, and four significant digits of a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
