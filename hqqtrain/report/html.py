"""Building blocks of a self-contained HTML page, which can be mailed as a single file.

Images are embedded in the page, so it fetches nothing. All text is escaped here; a parameter that
expects HTML instead of text says so.
"""

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

_STYLE = """
:root { color-scheme: light; --ink: #1d2733; --muted: #5b6b7f; --line: #e4e8ee; --tint: #f6f8fa; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--tint); color: var(--ink);
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { margin: 0; font-size: 26px; } h2 { margin: 0 0 12px; font-size: 17px; }
p { margin: 4px 0 0; color: var(--muted); }
section { margin-top: 24px; padding: 20px 24px; background: #fff; border: 1px solid var(--line);
          border-radius: 10px; overflow-x: auto; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 16px;
           margin-top: 24px; }
.figure { padding: 16px 20px; background: #fff; border: 1px solid var(--line);
          border-radius: 10px; }
.figure b { display: block; font-size: 24px; font-variant-numeric: tabular-nums; }
.figure span { color: var(--muted); font-size: 13px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(380px, 1fr)); gap: 24px; }
.plots section { display: flex; flex-direction: column; }
img { max-width: 100%; height: auto; margin: auto; display: block; }
.tables { columns: 2 420px; column-gap: 24px; }
.tables section { break-inside: avoid; display: inline-block; width: 100%; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: 5px 8px; border-top: 1px solid var(--line); text-align: left;
         vertical-align: top; overflow-wrap: anywhere; }
th { color: var(--muted); font-weight: 500; border-top: 0; }
td:last-child, th:last-child, .wide td, .wide th { text-align: right; }
.wide td, .wide th { overflow-wrap: normal; white-space: nowrap; }
.wide th { white-space: pre-line; vertical-align: bottom; }
details summary { cursor: pointer; font-weight: 600; }
"""


def render_page(title: str, subtitle: str, body: Iterable[str]) -> str:
    """Return the whole page; `title` and `subtitle` are text, `body` consists of HTML."""
    head = f"<h1>{escape(title)}</h1><p>{escape(subtitle)}</p>"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><main>{head}{''.join(body)}</main></body></html>\n"
    )


def render_images(files: Mapping[str, Path]) -> str:
    """Return sections with the PNG files (heading -> file), side by side if there is room."""
    sections = (render_image(heading, path) for heading, path in files.items())
    return f'<div class="plots">{"".join(sections)}</div>'


def render_tiles(numbers: Mapping[str, str]) -> str:
    """Return tiles with large numbers (label -> number)."""
    tile = '<div class="figure"><b>{}</b><span>{}</span></div>'
    tiles = (tile.format(escape(number), escape(label)) for label, number in numbers.items())
    return f'<div class="figures">{"".join(tiles)}</div>'


def render_image(heading: str, path: Path) -> str:
    """Return a section with the PNG file at `path` embedded."""
    data = base64.b64encode(path.read_bytes()).decode()
    element = f'<img alt="{escape(heading)}" src="data:image/png;base64,{data}">'
    return f"<section><h2>{escape(heading)}</h2>{element}</section>"


def render_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table. Cells are text; the header row is omitted if all headers are empty."""
    header_cells = "".join(f"<th>{escape(cell)}</th>" for cell in headers)
    header_row = f"<tr>{header_cells}</tr>" if any(headers) else ""
    cells_of_rows = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{cells}</tr>" for cells in cells_of_rows)
    return f"<table>{header_row}{body}</table>"


def format_number(value: Any) -> str:
    """Format a number for people: thousands separators, and four significant digits of a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
