"""Building blocks of a self-contained HTML page, which can be mailed as a single file.

Plots are a part of the page, so it fetches nothing, and it contains no script. All text is escaped
here; a parameter that expects HTML instead of text says so.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple
from urllib.parse import quote

from hqqtrain.report.text import escape_html

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --muted: #5b6b7f; --line: #e4e8ee;
        --page: #f6f8fa; --card: #fff; --good: #1f8a70; --bad: #c0392b; --warn: #b7791f;
        --mark: #c5ecdd; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaf0; --muted: #a3b0c0; --line: #333d4a; --page: #12171e; --card: #1b222c;
          --good: #4cc38a; --bad: #ff8a7a; --warn: #e5b567; --mark: #1c5544; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 20px 48px; }
h1 { margin: 0; font-size: 24px; overflow-wrap: anywhere; }
h2 { margin: 0 0 8px; font-size: 16px; } h3 { margin: 14px 0 2px; font-size: 14px; }
p { margin: 4px 0 0; color: var(--muted); overflow-wrap: anywhere; }
section { margin-top: 16px; padding: 14px 16px; background: var(--card); min-width: 0;
          border: 1px solid var(--line); border-radius: 10px; }
.state { display: inline-block; margin-top: 12px; padding: 3px 12px; border-radius: 99px;
         border: 1px solid currentColor; color: var(--muted); font-size: 14px; }
.done { color: var(--good); } .failed { color: var(--bad); }
.preempted, .unfinished { color: var(--warn); }
.cause { white-space: pre-wrap; color: var(--ink); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px;
           margin-top: 16px; }
.figure { padding: 10px 16px; background: var(--card); border: 1px solid var(--line);
          border-radius: 10px; }
.figure b { display: block; font-size: 22px; font-variant-numeric: tabular-nums; }
.figure span { color: var(--muted); font-size: 13px; }
.plots { display: grid; gap: 0 16px; align-items: start;
         grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); }
.plots.narrow { grid-template-columns: repeat(auto-fit, minmax(min(100%, 250px), 1fr)); }
svg { display: block; width: 100%; max-width: 560px; height: auto; margin: auto; }
.tables { columns: 3 300px; column-gap: 16px; }
.tables > div { break-inside: avoid; padding-bottom: 14px; }
.tables h3 { margin-top: 0; }
.tables table { table-layout: fixed; } .tables td:first-child { width: 52%; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums;
        font-size: 14px; }
td, th { padding: 4px 8px 4px 0; border-top: 1px solid var(--line); text-align: left;
         vertical-align: top; overflow-wrap: anywhere; }
th { color: var(--muted); font-weight: 500; border-top: 0; }
td:last-child, th:last-child { text-align: right; padding-right: 0; }
.scroll table { font-size: 13.5px; }
.scroll td, .scroll th { padding: 5px 7px; text-align: right; white-space: pre;
                         overflow-wrap: normal; }
.scroll th { vertical-align: bottom; }
a { color: inherit; }
details summary { cursor: pointer; font-weight: 600; }
.samples { display: grid; gap: 4px 16px;
           grid-template-columns: repeat(auto-fit, minmax(min(100%, 250px), 1fr)); }
pre { margin: 0; padding: 8px 10px; background: var(--page); border-radius: 6px; font-size: 12.5px;
      white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext; }
mark { background: var(--mark); color: inherit; border-radius: 3px; }
mark i { color: var(--muted); font-style: normal; }
"""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""A browser that enforces it runs no script, even if some text were not escaped."""


class Link(NamedTuple):
    """A cell of a table that refers to a file, by a path relative to the page."""

    text: str
    path: str


def render_page(
    title: str, subtitle: str, body: Iterable[str], *, refresh_seconds: int | None = None
) -> str:
    """Return the whole page; `title` and `subtitle` are text, `body` consists of HTML.

    Args:
        title: The heading, and the name of the browser's tab.
        subtitle: A line below the heading.
        body: The parts of the page.
        refresh_seconds: After this time a browser loads the page again; None: never.
    """
    refresh = f'<meta http-equiv="refresh" content="{refresh_seconds}">' if refresh_seconds else ""
    head = f"<h1>{escape_html(title)}</h1><p>{escape_html(subtitle)}</p>"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">{refresh}'
        f"<title>{escape_html(title)}</title><style>{_STYLE}</style></head>"
        f"<body><main>{head}{''.join(body)}</main></body></html>\n"
    )


def render_plots(plots: Mapping[str, str], *, narrow: bool = False) -> str:
    """Return sections with plots (heading -> SVG element), side by side if there is room."""
    if not plots:
        return ""
    sections = (render_section(heading, _named(svg, heading)) for heading, svg in plots.items())
    return f'<div class="plots{" narrow" if narrow else ""}">{"".join(sections)}</div>'


def _named(svg: str, name: str) -> str:
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape_html(name)}" ', 1)


def render_section(heading: str, html: str) -> str:
    """Return a section of the page with a heading, which is text."""
    return f"<section><h2>{escape_html(heading)}</h2>{html}</section>"


def render_details(heading: str, html: str) -> str:
    """Return a section that opens on a click; `heading` is text."""
    summary = f"<summary>{escape_html(heading)}</summary>"
    return f"<section><details>{summary}{html}</details></section>"


def render_tiles(numbers: Mapping[str, str]) -> str:
    """Return tiles with large numbers (label -> number)."""
    tile = '<div class="figure"><b>{}</b><span>{}</span></div>'
    tiles = (
        tile.format(escape_html(number), escape_html(label)) for label, number in numbers.items()
    )
    return f'<div class="figures">{"".join(tiles)}</div>' if numbers else ""


def render_state(state: str, text: str, cause: str = "") -> str:
    """Return how a run ended: its state, which selects the color, and its cause, if any."""
    css_class = state if state.isalpha() else ""
    html = f'<div class="state {css_class}">{escape_html(text)}</div>'
    return html + (f'<p class="cause">{escape_html(cause)}</p>' if cause else "")


def render_table(headers: Sequence[str], rows: Sequence[Sequence[str | Link]]) -> str:
    """Return a table. Cells are text or links; the header row is omitted if all are empty."""
    header_cells = "".join(f"<th>{escape_html(cell)}</th>" for cell in headers)
    header_row = f"<tr>{header_cells}</tr>" if any(headers) else ""
    cells_of_rows = ("".join(f"<td>{_cell(cell)}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{cells}</tr>" for cells in cells_of_rows)
    return f"<table>{header_row}{body}</table>"


def render_wide_table(headers: Sequence[str], rows: Sequence[Sequence[str | Link]]) -> str:
    """Return a table of numbers that scrolls by itself if the page is too narrow for it."""
    return f'<div class="scroll">{render_table(headers, rows)}</div>'


def render_tables(tables: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    """Return tables of names and values (heading -> rows), in as many columns as there is room."""
    html = (
        f"<div><h3>{escape_html(heading)}</h3>{render_table(('', ''), rows)}</div>"
        for heading, rows in tables.items()
    )
    return f'<div class="tables">{"".join(html)}</div>'


def _cell(cell: str | Link) -> str:
    if isinstance(cell, Link):
        # `quote` escapes colons, so the path cannot become a scheme such as `javascript:`.
        return f'<a href="{quote(cell.path)}">{escape_html(cell.text)}</a>'
    return escape_html(cell)
