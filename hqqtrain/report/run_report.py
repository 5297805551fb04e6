"""Writes report/: three plots and one self-contained page that show what a run did."""

import math
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from hqqtrain.common.files import atomic_write
from hqqtrain.report.html import (
    format_number,
    render_image,
    render_images,
    render_page,
    render_table,
    render_tiles,
)
from hqqtrain.report.plots import plot_layer_errors, plot_loss, plot_perplexities
from hqqtrain.report.style import save_figure
from hqqtrain.rundir.layout import RunLayout
from hqqtrain.rundir.schema import MODEL_NAMES
from hqqtrain.tracking.jsonl import read_metrics


def write_report(
    run_dir: Path,
    metrics_jsonl: Path,
    summary: Mapping[str, Any],
    layer_errors: Mapping[str, float],
) -> dict[str, Path]:
    """Write `run_dir`/report/.

    Args:
        run_dir: the run directory.
        metrics_jsonl: the metrics of the run; the file may be missing.
        summary: the content of summary.json, schema 1. The report omits parts that the task did
            not run.
        layer_errors: module name -> relative error.

    Returns:
        The written files by name: the plots and `index`.
    """
    folder = RunLayout(run_dir).report
    folder.mkdir(parents=True, exist_ok=True)
    rows = read_metrics(metrics_jsonl) if metrics_jsonl.exists() else []
    plots = {
        "loss": plot_loss(rows),
        "perplexity": plot_perplexities(measured_perplexities(summary)),
        "layers": plot_layer_errors(layer_errors),
    }
    files = {n: save_figure(figure, folder / f"{n}.png") for n, figure in plots.items() if figure}
    headings = {"loss": "Loss", "perplexity": "Perplexity", "layers": "Relative error by layer"}
    html = render_report(
        str(summary.get("run", {}).get("name") or run_dir.name), summary, key_figures(summary),
        {headings[name]: path for name, path in files.items()}, layer_errors,
    )  # fmt: skip
    return files | {"index": atomic_write(RunLayout(run_dir).report_html, html)}


def measured_perplexities(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return model -> perplexity, for the models with a finite one.

    The models are `full precision`, `quantized` and `trained`.
    """
    measured = summary.get("eval", {})
    values = {name: measured.get(key, {}).get("perplexity") for key, name in MODEL_NAMES.items()}
    return {name: value for name, value in values.items() if value and math.isfinite(value)}


def key_figures(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return the numbers at the top of the page, by label."""
    found = measured_perplexities(summary)
    figures = {f"perplexity, {name}": f"{value:.2f}" for name, value in found.items()}
    if len(found) == len(MODEL_NAMES) and found["quantized"] > found["full precision"]:
        gap = found["quantized"] - found["full precision"]
        figures["of the gap closed"] = f"{(found['quantized'] - found['trained']) / gap:.0%}"
    bits = summary.get("quantize", {}).get("bits_per_weight")
    if bits is not None:
        figures["bits per weight"] = format_number(float(bits))
    return figures


def render_report(
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
    parts = {name: part for name, part in summary.items() if isinstance(part, Mapping)}
    tables = "".join(
        f"<section><h2>{escape(name)}</h2>{render_table(('', ''), _rows(part))}</section>"
        for name, part in parts.items()
    )
    body = [
        render_tiles(figures),
        render_images(side_by_side),
        *(render_image(*item) for item in wide.items()),
        f'<div class="tables">{tables}</div>',
        _layer_table(layer_errors),
    ]
    return render_page(title, _subtitle(summary), body)


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


def _rows(part: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return (name, value) of every number in a part of the summary, nested parts included."""
    rows: list[tuple[str, str]] = []
    for name, value in part.items():
        nested = isinstance(value, Mapping)
        rows += (
            _rows(value, f"{prefix}{name} ") if nested else [(prefix + name, format_number(value))]
        )
    return [(name.replace("_", " "), value) for name, value in rows]


def _layer_table(errors: Mapping[str, float]) -> str:
    if not errors:
        return ""
    rows = [(name, f"{error:.5f}") for name, error in errors.items()]
    rendered = render_table(("module", "relative error"), rows)
    heading = f"<summary>Relative error of {len(rows)} modules</summary>"
    return f"<section><details>{heading}{rendered}</details></section>"
