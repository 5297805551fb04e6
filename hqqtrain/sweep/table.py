"""The results table of a sweep: one row per job, as CSV for programs and as text for people."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from hqqtrain.sweep.outcomes import Outcomes
from hqqtrain.sweep.sweep import Sweep

COLUMNS = {
    "bits_per_weight": ("bits per\nweight", ".2f"),
    "relative_error": ("relative\nerror", ".4f"),
    "perplexity_full_precision": ("perplexity\nin full", ",.3f"),
    "perplexity_quantized": ("perplexity\nquantized", ",.3f"),
    "perplexity_final": ("perplexity\ntrained", ",.3f"),
    "kl_quantized": ("KL\nquantized", ".4f"),
    "kl_final": ("KL\ntrained", ".4f"),
    "quantize_seconds": ("quantize\nseconds", ".1f"),
    "train_seconds": ("train\nseconds", ".1f"),
    "peak_memory_gib": ("peak\nGiB", ".3f"),
    "tokens_per_second": ("tokens/s", ",.0f"),
}
"""Figure -> (heading, format).

A job that reads quantized weights from the cache has their loading time as `quantize_seconds`.
"""


@dataclass(frozen=True)
class Row:
    """One job: its values of the swept keys and, if it is done, its figures."""

    swept: dict[str, str]
    figures: dict[str, float | None]
    status: str
    folder: str


def rows_of(sweep: Sweep, outcomes: Outcomes | None = None) -> list[Row]:
    """Return one row per job, whatever its state.

    `outcomes` defaults to the saved ones; a caller with unsaved outcomes passes them.
    """
    outcomes, rows = outcomes or Outcomes(sweep), []
    for job in sweep.jobs:
        state = outcomes.state(job)
        job_figures = figures(job.summary() if state == "done" else {})
        rows.append(Row(sweep.values(job), job_figures, state, str(job.folder)))
    return rows


def figures(summary: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the figures of COLUMNS from a summary.json; None if not measured or not finite."""
    quantize, train = summary.get("quantize", {}), summary.get("train", {})
    measured = summary.get("eval", {})
    peaks = [part["peak_memory_gib"] for part in (quantize, train) if "peak_memory_gib" in part]
    values = {
        "bits_per_weight": quantize.get("bits_per_weight"),
        "relative_error": quantize.get("relative_error"),
        "quantize_seconds": quantize.get("seconds"),
        "train_seconds": train.get("seconds"),
        "peak_memory_gib": max(peaks, default=None),
        "tokens_per_second": train.get("tokens_per_second"),
    }
    for part in ("full_precision", "quantized", "final"):
        values[f"perplexity_{part}"] = measured.get(part, {}).get("perplexity")
        values[f"kl_{part}"] = measured.get(part, {}).get("kl")
    return {name: _finite(values[name]) for name in COLUMNS}


def csv_text(rows: Sequence[Row]) -> str:
    """Return the table as CSV, with unrounded figures and an empty cell for a missing one."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*rows[0].swept, *COLUMNS, "status", "folder"])
    for row in rows:
        writer.writerow([*row.swept.values(), *row.figures.values(), row.status, row.folder])
    return text.getvalue()


def cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return (headings, rows of cells) for people: rounded, with a dash for a missing figure."""
    headings = [heading for heading, _ in COLUMNS.values()]
    lines = [
        [
            *row.swept.values(),
            *(_formatted(row.figures[name], spec) for name, (_, spec) in COLUMNS.items()),
            row.status,
            row.folder,
        ]
        for row in rows
    ]
    swept = [key.replace(".", ".\n") for key in rows[0].swept]
    return [*swept, *headings, "status", "folder"], lines


def text_table(rows: Sequence[Row]) -> str:
    """Return the table as plain text, one line per job."""
    headings, lines = cells(rows)
    align = ["right"] * (len(headings) - 2) + ["left", "left"]
    short = [[*line[:-1], Path(line[-1]).name] for line in lines]  # the name of the folder only
    return tabulate([headings, [], *short], tablefmt="plain", colalign=align, disable_numparse=True)


def _formatted(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _finite(value: Any) -> float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None
