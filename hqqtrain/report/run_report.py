"""Write report/: the plots of a run, and one self-contained page with its settings and results.

The page shows whatever the run has written so far. So it can be written during the run, and
after it has failed.
"""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hqqtrain.common.errors import UserError
from hqqtrain.common.files import atomic_write, make_folder
from hqqtrain.common.text import count
from hqqtrain.report.html import (
    render_details,
    render_page,
    render_plots,
    render_section,
    render_state,
    render_table,
    render_tables,
    render_tiles,
)
from hqqtrain.report.layers import plot_layer_errors
from hqqtrain.report.plots import (
    STEP_METRICS,
    Rows,
    best_step,
    plot_loss,
    plot_perplexities,
    plot_step_metric,
)
from hqqtrain.report.samples import Sample, render_samples
from hqqtrain.report.settings import render_settings
from hqqtrain.report.style import save_figure
from hqqtrain.report.text import format_number
from hqqtrain.rundir.identity import read_yaml
from hqqtrain.rundir.layout import RunLayout
from hqqtrain.rundir.schema import GLOBAL_STEP, MODEL_NAMES, Status, read_status
from hqqtrain.tracking.base import layer_errors
from hqqtrain.tracking.jsonl import read_metrics

LIVE_SECONDS = 60
"""Seconds between two reports of a run, and after which a browser loads the page again."""

_HEADINGS = {"loss": "Loss", "perplexity": "Perplexity", "layers": "Quantization error by layer"}
"""Headings of the larger plots."""

_STEP_HEADINGS = {name.partition("/")[2]: heading for name, heading in STEP_METRICS.items()}
"""Headings of the smaller plots."""


def write_report(
    run_dir: Path,
    summary: Mapping[str, Any],
    *,
    status: Status | None = None,
    samples: Sequence[Sample] = (),
    images: bool = False,
) -> dict[str, Path]:
    """Write `run_dir`/report/ from the files of the run, any of which may be missing.

    Args:
        run_dir: The run directory.
        summary: The content of summary.json, schema 1, as far as it is known. The report omits
            parts that the task did not run.
        status: How the run has ended; by default, status.json says it.
        samples: Continuations of held-out text, before and after training.
        images: Whether to write the larger plots as PNG, too, for trackers that cannot show SVG.

    Returns:
        The written files by name: the plots, their images as `NAME.png`, and `index`.
    """
    layout = RunLayout(run_dir)
    make_folder(layout.report)
    rows = _read_rows(layout)
    errors = next((found for row in rows if (found := layer_errors(row))), {})
    figures = {
        "loss": plot_loss(rows),
        "perplexity": plot_perplexities(measured_perplexities(summary)),
        "layers": plot_layer_errors(errors),
        **{name.partition("/")[2]: plot_step_metric(rows, name) for name in STEP_METRICS},
    }
    files: dict[str, Path] = {}
    for name, figure in figures.items():
        if figure:
            files[name] = save_figure(figure, layout.report / f"{name}.svg")
            if images and name in _HEADINGS:
                files[f"{name}.png"] = save_figure(figure, layout.report / f"{name}.png")
    plots = {name: path.read_text() for name, path in files.items() if path.suffix == ".svg"}
    status = status or read_status(layout.status_json)
    page = _render(run_dir, summary, status, plots, rows, errors, samples)
    return files | {"index": atomic_write(layout.report_html, page)}


def measured_perplexities(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return model -> perplexity, for the models whose perplexity was measured and is finite.

    The models are `full precision`, `quantized` and `trained`.
    """
    evaluation = summary.get("eval", {})
    values = {name: evaluation.get(key, {}).get("perplexity") for key, name in MODEL_NAMES.items()}
    return {name: value for name, value in values.items() if value and math.isfinite(value)}


def key_numbers(summary: Mapping[str, Any], rows: Rows = ()) -> dict[str, str]:
    """Return the formatted numbers at the top of the page, by label.

    If all three models were measured, one number says which share of the increase in perplexity
    due to quantization the training has removed.

    Args:
        summary: The content of summary.json.
        rows: The metrics of the run.
    """
    perplexities = measured_perplexities(summary)
    numbers = {f"perplexity, {name}": f"{value:,.2f}" for name, value in perplexities.items()}
    if len(perplexities) == len(MODEL_NAMES):
        full_precision, quantized, trained = (perplexities[name] for name in MODEL_NAMES.values())
        if quantized > full_precision:
            closed = (quantized - trained) / (quantized - full_precision)
            numbers["of the gap closed"] = f"{closed:.0%}"
    for label, name, form in (("KL", "kl", ".4f"), ("top-1 agreement", "top1_agreement", ".1%")):
        for key in ("quantized", "final"):
            value = summary.get("eval", {}).get(key, {}).get(name)
            if value is not None:
                numbers[f"{label}, {MODEL_NAMES[key]}"] = format(value, form)
    bits = summary.get("quantize", {}).get("bits_per_weight")
    if bits is not None:
        numbers["bits per weight"] = format_number(float(bits))
    training = summary.get("train", {})
    best = training.get("best_step") or best_step(rows)
    if best is not None:
        is_result = training.get("adapter_step") == best
        label = "step with the lowest held-out loss" + (
            ", which is the result" if is_result else ""
        )
        numbers[label] = f"{best:,}"
    return numbers


def describe_state(status: Status, config: Mapping[str, Any], rows: Rows) -> str:
    """Return how the run has ended, or how far it is, in a few words."""
    state = status.status or "unknown state"
    words = {
        "done": "done",
        "preempted": "preempted; the same command resumes it",
        "failed": f"failed with exit code {status.exit_code}",
    }
    parts = [words.get(state, state)]
    step = max((row[GLOBAL_STEP] for row in rows if "train/loss" in row), default=0)
    if step and state != "done":
        total = (config.get("train") or {}).get("max_steps")
        parts.append(f"step {step:,} of {total:,}" if isinstance(total, int) else f"step {step:,}")
    return " · ".join([*parts, time.strftime("%Y-%m-%d %H:%M:%S %Z")])


def _render(
    run_dir: Path, summary: Mapping[str, Any], status: Status, plots: Mapping[str, str],
    rows: Rows, errors: Mapping[str, float], samples: Sequence[Sample],
) -> str:  # fmt: skip
    """Return the page; `plots` are SVG elements by name, the rest is as in `write_report`."""
    config = _read_config(RunLayout(run_dir))
    parts = {name: dict(part) for name, part in summary.items() if isinstance(part, Mapping)}
    parts.get("run", {}).pop("versions", None)  # they are among the settings
    state = describe_state(status, config, rows)
    body = [
        render_state(status.status or "", state, status.cause or ""),
        render_tiles(key_numbers(summary, rows)),
        render_plots({title: plots[name] for name, title in _HEADINGS.items() if name in plots}),
        render_plots(
            {title: plots[name] for name, title in _STEP_HEADINGS.items() if name in plots},
            narrow=True,
        ),
        render_samples(samples),
        render_settings(config),
        render_section("Results", render_tables({n: _part_rows(p) for n, p in parts.items()})),
        _layer_table(errors),
    ]
    title = str(summary.get("run", {}).get("name") or run_dir.name)
    is_running = status.status == "running"
    refresh_seconds = LIVE_SECONDS if is_running else None
    return render_page(title, _subtitle(summary), body, refresh_seconds=refresh_seconds)


def _read_rows(layout: RunLayout) -> Rows:
    """Return the rows of metrics.jsonl; none if it is missing or damaged."""
    try:
        return read_metrics(layout.metrics_jsonl)
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _read_config(layout: RunLayout) -> Mapping[str, Any]:
    """Return the content of config.yaml; nothing if it is damaged."""
    try:
        return read_yaml(layout.config_yaml)
    except UserError:
        return {}


def _subtitle(summary: Mapping[str, Any]) -> str:
    """Return recipe, task, processes, device, held-out set and protocol of the evaluation.

    Without a record in `summary`, one process on a CPU is assumed; other parts are left out.
    """
    run, evaluation = summary.get("run", {}), summary.get("eval", {})
    world_size = run.get("world_size", 1)
    parts = [
        f"recipe {run['recipe']}" if run.get("recipe") else "",
        f"task {run['task']}" if run.get("task") else "",
        f"{count(world_size, 'process')} on {run.get('device') or 'cpu'}",
        f"measured on {evaluation['dataset']}" if evaluation.get("dataset") else "",
        _describe_protocol(evaluation),
    ]
    return " · ".join(filter(None, parts))


def _describe_protocol(evaluation: Mapping[str, Any]) -> str:
    """Return how perplexity was measured; empty if it was not, or by an earlier release."""
    if not evaluation.get("protocol"):
        return ""
    context, stride = (format_number(evaluation.get(key)) for key in ("context", "stride"))
    return f"eval.protocol={evaluation['protocol']}, context {context}, stride {stride}"


def _part_rows(part: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return (name, formatted value) of every entry in a part of the summary.

    The names of nested entries begin with `prefix`, the names of their parents.
    """
    rows: list[tuple[str, str]] = []
    for name, value in part.items():
        full_name = prefix + name.replace("_", " ")
        if isinstance(value, Mapping):
            rows += _part_rows(value, f"{full_name} ")
        else:
            rows.append((full_name, "null" if value is None else format_number(value)))
    return rows


def _layer_table(errors: Mapping[str, float]) -> str:
    """Return a table of the relative errors that opens on a click; empty without errors."""
    if not errors:
        return ""
    rows = [(name, f"{error:.5f}") for name, error in errors.items()]
    table = render_table(("module", "relative error"), rows)
    return render_details(f"Relative error of {count(len(rows), 'module')}", table)
