"""Write report/: up to three plots, and one self-contained page with all results of a run."""

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
    files = {
        name: save_figure(figure, folder / f"{name}.png")
        for name, figure in plots.items()
        if figure
    }
    headings = {"loss": "Loss", "perplexity": "Perplexity", "layers": "Relative error by layer"}
    html = render_report(
        str(summary.get("run", {}).get("name") or run_dir.name), summary, key_numbers(summary),
        {headings[name]: path for name, path in files.items()}, layer_errors,
    )  # fmt: skip
    return files | {"index": atomic_write(RunLayout(run_dir).report_html, html)}


def measured_perplexities(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return model -> perplexity, for the models whose perplexity was measured and is finite.

    The models are `full precision`, `quantized` and `trained`.
    """
    evaluation = summary.get("eval", {})
    values = {name: evaluation.get(key, {}).get("perplexity") for key, name in MODEL_NAMES.items()}
    return {name: value for name, value in values.items() if value and math.isfinite(value)}


def key_numbers(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return the formatted numbers at the top of the page, by label.

    If all three models were measured, one number says which share of the increase in perplexity
    due to quantization the training has removed.
    """
    perplexities = measured_perplexities(summary)
    numbers = {f"perplexity, {name}": f"{value:.2f}" for name, value in perplexities.items()}
    if len(perplexities) == len(MODEL_NAMES):
        full_precision, quantized, trained = (perplexities[name] for name in MODEL_NAMES.values())
        if quantized > full_precision:
            closed = (quantized - trained) / (quantized - full_precision)
            numbers["of the gap closed"] = f"{closed:.0%}"
    bits = summary.get("quantize", {}).get("bits_per_weight")
    if bits is not None:
        numbers["bits per weight"] = format_number(float(bits))
    return numbers


def render_report(
    title: str,
    summary: Mapping[str, Any],
    numbers: Mapping[str, str],
    plots: Mapping[str, Path],
    layer_errors: Mapping[str, float],
) -> str:
    """Return the page of a run's report.

    Args:
        title: the name of the run.
        summary: the content of summary.json.
        numbers: label -> number, shown large at the top.
        plots: heading -> PNG file.
        layer_errors: module name -> relative error.
    """
    # The plot of all layers needs the full width of the page.
    wide = {heading: path for heading, path in plots.items() if path.stem == "layers"}
    side_by_side = {heading: path for heading, path in plots.items() if heading not in wide}
    parts = {name: part for name, part in summary.items() if isinstance(part, Mapping)}
    tables = "".join(
        f"<section><h2>{escape(name)}</h2>{render_table(('', ''), _rows(part))}</section>"
        for name, part in parts.items()
    )
    body = [
        render_tiles(numbers),
        render_images(side_by_side),
        *(render_image(heading, path) for heading, path in wide.items()),
        f'<div class="tables">{tables}</div>',
        _layer_table(layer_errors),
    ]
    return render_page(title, _subtitle(summary), body)


def _subtitle(summary: Mapping[str, Any]) -> str:
    """Return recipe, task, processes, device and held-out set.

    Without a record in `summary`, one process on a CPU is assumed; other parts are left out.
    """
    run, evaluation = summary.get("run", {}), summary.get("eval", {})
    world_size = run.get("world_size", 1)
    parts = [
        f"recipe {run['recipe']}" if run.get("recipe") else "",
        f"task {run['task']}" if run.get("task") else "",
        f"{world_size} process{'es' if world_size != 1 else ''} on {run.get('device') or 'cpu'}",
        f"measured on {evaluation['dataset']}" if evaluation.get("dataset") else "",
    ]
    return " · ".join(filter(None, parts))


def _rows(part: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return (name, formatted value) of every entry in a part of the summary.

    The names of nested entries begin with `prefix`, the names of their parents.
    """
    rows: list[tuple[str, str]] = []
    for name, value in part.items():
        full_name = prefix + name.replace("_", " ")
        if isinstance(value, Mapping):
            rows += _rows(value, f"{full_name} ")
        else:
            rows.append((full_name, format_number(value)))
    return rows


def _layer_table(errors: Mapping[str, float]) -> str:
    """Return a table of the relative errors that opens on a click; empty without errors."""
    if not errors:
        return ""
    rows = [(name, f"{error:.5f}") for name, error in errors.items()]
    table = render_table(("module", "relative error"), rows)
    heading = f"<summary>Relative error of {len(rows)} modules</summary>"
    return f"<section><details>{heading}{table}</details></section>"
