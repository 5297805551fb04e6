"""report/index.html: a self-contained page with embedded images, which can be mailed."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from hqqtrain.track.document import document, image, images, number, table, tiles


def page(
    title: str,
    summary: Mapping[str, Any],
    figures: Mapping[str, str],
    plots: Mapping[str, Path],
    layer_errors: Mapping[str, float],
) -> str:
    """Return the page of a run's report.

    Args:
        title: the name of the run.
        summary: the content of summary.json.
        figures: label -> number, shown large at the top.
        plots: heading -> PNG file.
        layer_errors: module name -> relative error.
    """
    wide = {name: path for name, path in plots.items() if path.stem == "layers"}
    side_by_side = {name: path for name, path in plots.items() if name not in wide}
    body = [
        tiles(figures),
        images(side_by_side),
        *(image(*item) for item in wide.items()),
        f'<div class="tables">{"".join(_summary_tables(summary))}</div>',
        _layer_table(layer_errors),
    ]
    return document(title, _subtitle(summary), body)


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


def _summary_tables(summary: Mapping[str, Any]) -> list[str]:
    parts = {name: part for name, part in summary.items() if isinstance(part, Mapping)}
    return [
        f"<section><h2>{escape(name)}</h2>{table(('', ''), _rows(part))}</section>"
        for name, part in parts.items()
    ]


def _rows(part: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return (name, value) of every number in a part of the summary, nested parts included."""
    rows: list[tuple[str, str]] = []
    for name, value in part.items():
        nested = isinstance(value, Mapping)
        rows += _rows(value, f"{prefix}{name} ") if nested else [(prefix + name, number(value))]
    return [(name.replace("_", " "), value) for name, value in rows]


def _layer_table(errors: Mapping[str, float]) -> str:
    if not errors:
        return ""
    rows = [(name, f"{error:.5f}") for name, error in errors.items()]
    rendered = table(("module", "relative error"), rows)
    heading = f"<summary>Relative error of {len(rows)} modules</summary>"
    return f"<section><details>{heading}{rendered}</details></section>"
