"""Writes report/: three plots and one self-contained page that show what a run did."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hqqtrain.config.atomic import atomic_write
from hqqtrain.track.document import number
from hqqtrain.track.figures import save_figure
from hqqtrain.track.jsonl import read_metrics
from hqqtrain.track.page import page
from hqqtrain.track.plots import layer_figure, loss_figure, perplexity_figure

_MODELS = {"full_precision": "full precision", "quantized": "quantized", "final": "trained"}


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
    folder = run_dir / "report"
    folder.mkdir(parents=True, exist_ok=True)
    rows = read_metrics(metrics_jsonl) if metrics_jsonl.exists() else []
    plots = {
        "loss": loss_figure(rows),
        "perplexity": perplexity_figure(perplexities(summary)),
        "layers": layer_figure(layer_errors),
    }
    files = {n: save_figure(figure, folder / f"{n}.png") for n, figure in plots.items() if figure}
    headings = {"loss": "Loss", "perplexity": "Perplexity", "layers": "Relative error by layer"}
    html = page(
        str(summary.get("run", {}).get("name") or run_dir.name), summary, key_figures(summary),
        {headings[name]: path for name, path in files.items()}, layer_errors,
    )  # fmt: skip
    return files | {"index": atomic_write(folder / "index.html", html)}


def perplexities(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return model -> perplexity, for the models with a finite one.

    The models are `full precision`, `quantized` and `trained`.
    """
    measured = summary.get("eval", {})
    values = {name: measured.get(key, {}).get("perplexity") for key, name in _MODELS.items()}
    return {name: value for name, value in values.items() if value and math.isfinite(value)}


def key_figures(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return the numbers at the top of the page, by label."""
    found = perplexities(summary)
    figures = {f"perplexity, {name}": f"{value:.2f}" for name, value in found.items()}
    if len(found) == len(_MODELS) and found["quantized"] > found["full precision"]:
        gap = found["quantized"] - found["full precision"]
        figures["of the gap closed"] = f"{(found['quantized'] - found['trained']) / gap:.0%}"
    bits = summary.get("quantize", {}).get("bits_per_weight")
    if bits is not None:
        figures["bits per weight"] = number(float(bits))
    return figures
