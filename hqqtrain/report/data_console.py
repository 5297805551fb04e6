"""The view of task=data on the console.

A sample may contain anything. Its lines have a margin, so none can pass for a line of ours, and
control characters are escaped, so none can move the cursor or set a color. Long lines are wrapped
here, because a terminal would begin their rest without the margin.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence

from hqqtrain.report.data_view import PLAIN_TEXT, DataSample, DataView, Piece
from hqqtrain.report.text import escape_controls

_BAR_WIDTH = 40
"""Characters of the longest bar of the histogram."""

_MARGIN, _WRAPPED_MARGIN = "  | ", "  : "
"""Before each line of a sample, and before the rest of a line that is too long."""

_MIN_WIDTH = 20
"""Fewest columns of the text of a sample; a terminal with less wraps it once more."""

_TRAINED, _SPECIAL, _RESET = "\033[32m", "\033[1m", "\033[0m"  # green, bold

_NEWLINE_SIGN = "\u21b5"
"""Shows a trained line ending, which has no color of its own."""


def render_data(
    view: DataView, *, color: bool, can_show_unicode: bool = True, columns: int | None = None
) -> str:
    """Return the figures and the samples as lines of text.

    Args:
        view: The data.
        color: Whether trained tokens are colored. Otherwise marks enclose them.
        can_show_unicode: Whether the console shows characters beyond ASCII.
        columns: Width of the terminal; None: lines may have any length.
    """
    figures = view.figures()
    width = max(map(len, figures))
    lines = [f"{name:<{width}}  {escape_controls(value)}" for name, value in figures.items()]
    lines += ["", "examples by their number of tokens", *_bars(view.bars())]
    if view.samples:
        sign = _NEWLINE_SIGN if can_show_unicode else ""
        text_width = max(_MIN_WIDTH, columns - len(_MARGIN)) if columns else None
        lines += ["", *_samples(view, color, sign, text_width)]
    return "\n".join(lines) + "\n"


def choose_marks(texts: Iterable[str]) -> tuple[str, str]:
    """Return marks for the beginning and the end of trained text, neither of which is in `texts`.

    They are brackets with a space: `[[ ` and ` ]]`, or more brackets. A bracket of the text beside
    a mark is no part of it, because the space is on the inner side.
    """
    all_texts = list(texts)
    number = 2
    while any(
        mark in text for text in all_texts for mark in ("[" * number + " ", " " + "]" * number)
    ):
        number += 1
    return "[" * number + " ", " " + "]" * number


def _bars(bars: Sequence[tuple[str, int]]) -> list[str]:
    longest = max(number for _, number in bars)
    width = max(len(label) for label, _ in bars)
    return [f"  {label:>{width}} | {_bar(number, longest)}{number:,}" for label, number in bars]


def _bar(number: int, longest: int) -> str:
    """Return a bar that is visible for every number but 0."""
    return "#" * -(-_BAR_WIDTH * number // longest) + " " if number else ""


def _samples(view: DataView, color: bool, newline_sign: str, width: int | None) -> list[str]:
    """Return the lines of all samples, after a line that says what the marks mean."""
    legend, render = _style(view, color, newline_sign)
    lines = [legend]
    for sample in view.samples:
        lines += ["", escape_controls(sample.title), *_with_margin(render(sample.pieces), width)]
        if sample.hidden_tokens:
            lines += [sample.hidden_note, *_with_margin(render(sample.last_pieces), width)]
    return lines


def _style(
    view: DataView, color: bool, newline_sign: str
) -> tuple[str, Callable[[Sequence[Piece]], str]]:
    """Return a line that says how trained tokens are shown, and a function that shows pieces."""
    if view.is_plain_text:
        return PLAIN_TEXT, lambda pieces: escape_controls("".join(piece.text for piece in pieces))
    if color:
        sign = f", and {newline_sign} is a trained line ending" if newline_sign else ""
        return (
            f"{_TRAINED}Green{_RESET} tokens are trained, {_SPECIAL}bold{_RESET} ones are special "
            f"tokens{sign}."
        ), lambda pieces: "".join(_color(piece, newline_sign) for piece in pieces)
    begin, end = choose_marks(
        escape_controls(text) for sample in view.samples for text in _texts(sample)
    )
    return (
        f"Tokens between {begin.strip()} and {end.strip()} are trained; the marks and the space on "
        "their inner side are not part of the text."
    ), lambda pieces: _mark(pieces, begin, end)


def _texts(sample: DataSample) -> list[str]:
    """Return the text of each run of pieces that are trained, or not, alike."""
    return [text for part in (sample.pieces, sample.last_pieces) for text, _ in _runs(part)]


def _runs(pieces: Sequence[Piece]) -> list[tuple[str, bool]]:
    """Join neighboring pieces that are trained, or not, alike."""
    runs: list[tuple[str, bool]] = []
    for piece in pieces:
        if runs and runs[-1][1] == piece.is_trained:
            runs[-1] = (runs[-1][0] + piece.text, piece.is_trained)
        else:
            runs.append((piece.text, piece.is_trained))
    return runs


def _mark(pieces: Sequence[Piece], begin: str, end: str) -> str:
    return "".join(
        f"{begin}{escape_controls(text)}{end}" if is_trained else escape_controls(text)
        for text, is_trained in _runs(pieces)
    )


def _color(piece: Piece, newline_sign: str) -> str:
    """Return the text of a piece. Each of its lines sets the color again, after the margin."""
    text = escape_controls(piece.text)
    codes = _TRAINED * piece.is_trained + _SPECIAL * piece.is_special
    if not codes:
        return text
    if piece.is_trained:
        text = text.replace("\n", f"{newline_sign}\n")
    return "\n".join(f"{codes}{line}{_RESET}" if line else "" for line in text.split("\n"))


def _with_margin(text: str, width: int | None) -> list[str]:
    lines = []
    for line in text.split("\n"):
        first, *rest = wrap_colored(line, width) if width else [line]
        lines += [_MARGIN + first, *(_WRAPPED_MARGIN + part for part in rest)]
    return lines


def wrap_colored(line: str, width: int) -> list[str]:
    """Cut a line into parts of at most `width` columns, each of which sets its colors again."""
    parts, part, used, codes = [], "", 0, ""
    for item in re.findall("\033\\[\\d+m|.", line):
        if item.startswith("\033"):
            codes = "" if item == _RESET else codes + item
        elif used + _columns(item) > width:
            parts.append(part + (_RESET if codes else ""))
            part, used = codes, 0
        used += 0 if item.startswith("\033") else _columns(item)
        part += item
    return [*parts, part]


def _columns(character: str) -> int:
    """Return the columns of a character on a terminal; those of a tab, at most."""
    if character == "\t":
        return 8
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1
