"""report/index.html: one file that can be mailed, images inside it, nothing fetched."""

import base64
from collections.abc import Mapping, Sequence
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
td:last-child, th:last-child { text-align: right; }
details summary { cursor: pointer; font-weight: 600; }
"""


def page(
    title: str,
    summary: Mapping[str, Any],
    figures: Mapping[str, str],
    plots: Mapping[str, Path],
    layer_errors: Mapping[str, float],
) -> str:
    """The whole document. `figures`: label -> number, shown large; `plots`: heading -> PNG."""
    wide = {name: path for name, path in plots.items() if path.stem == "layers"}
    small = {name: path for name, path in plots.items() if name not in wide}
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(_subtitle(summary))}</p>",
        _tiles(figures),
        f'<div class="plots">{"".join(_plot(*item) for item in small.items())}</div>',
        *(_plot(*item) for item in wide.items()),
        f'<div class="tables">{"".join(_summary_tables(summary))}</div>',
        _layer_table(layer_errors),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _subtitle(summary: Mapping[str, Any]) -> str:
    run, evaluation = summary.get("run", {}), summary.get("eval", {})
    processes = run.get("world_size", 1)
    parts = [
        f"recipe {run['recipe']}" if run.get("recipe") else "",
        f"task {run['task']}" if run.get("task") else "",
        f"{processes} process{'es' if processes != 1 else ''} on {run.get('device') or 'cpu'}",
        f"measured on {evaluation['dataset']}" if evaluation.get("dataset") else "",
    ]
    return " · ".join(filter(None, parts))


def _tiles(figures: Mapping[str, str]) -> str:
    tile = '<div class="figure"><b>{}</b><span>{}</span></div>'
    tiles = (tile.format(escape(value), escape(label)) for label, value in figures.items())
    return f'<div class="figures">{"".join(tiles)}</div>'


def _plot(heading: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    image = f'<img alt="{escape(heading)}" src="data:image/png;base64,{data}">'
    return f"<section><h2>{escape(heading)}</h2>{image}</section>"


def _summary_tables(summary: Mapping[str, Any]) -> list[str]:
    parts = {name: part for name, part in summary.items() if isinstance(part, Mapping)}
    return [
        f"<section><h2>{escape(name)}</h2>{_table(('', ''), _rows(part))}</section>"
        for name, part in parts.items()
    ]


def _rows(part: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in part.items():
        nested = isinstance(value, Mapping)
        rows += _rows(value, f"{prefix}{name} ") if nested else [(prefix + name, number(value))]
    return [(name.replace("_", " "), value) for name, value in rows]


def _layer_table(errors: Mapping[str, float]) -> str:
    if not errors:
        return ""
    rows = [(name, f"{error:.5f}") for name, error in errors.items()]
    table = _table(("module", "relative error"), rows)
    heading = f"<summary>Relative error of {len(rows)} modules</summary>"
    return f"<section><details>{heading}{table}</details></section>"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in headers)
    lines = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table>{f'<tr>{head}</tr>' if any(headers) else ''}{body}</table>"


def number(value: Any) -> str:
    """Digits a person reads: thousands separated, four significant ones for small numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
