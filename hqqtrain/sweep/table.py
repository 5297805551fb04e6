"""The jobs of a sweep side by side: a row each, as CSV for programs and as text for people."""

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
"""Figure -> (heading, format). `quantize_seconds` of shared weights are those of reading them."""


@dataclass(frozen=True)
class Row:
    """A job: its values of the swept keys and, where it is done, its figures."""

    swept: dict[str, str]
    figures: dict[str, float | None]
    status: str
    folder: str


def rows_of(sweep: Sweep, outcomes: Outcomes | None = None) -> list[Row]:
    """A row for every job, whatever has become of it; `outcomes` if they are not all saved yet."""
    outcomes, rows = outcomes or Outcomes(sweep), []
    for job in sweep.jobs:
        state = outcomes.state(job)
        found = figures(job.summary() if state == "done" else {})
        rows.append(Row(sweep.values(job), found, state, str(job.folder)))
    return rows


def figures(summary: Mapping[str, Any]) -> dict[str, float | None]:
    """What COLUMNS names, of a summary.json; None where it was not measured or is not finite."""
    quantize, train = summary.get("quantize", {}), summary.get("train", {})
    measured = summary.get("eval", {})
    peaks = [part["peak_memory_gib"] for part in (quantize, train) if "peak_memory_gib" in part]
    found = {
        "bits_per_weight": quantize.get("bits_per_weight"),
        "relative_error": quantize.get("relative_error"),
        "quantize_seconds": quantize.get("seconds"),
        "train_seconds": train.get("seconds"),
        "peak_memory_gib": max(peaks, default=None),
        "tokens_per_second": train.get("tokens_per_second"),
    }
    for part in ("full_precision", "quantized", "final"):
        found[f"perplexity_{part}"] = measured.get(part, {}).get("perplexity")
        found[f"kl_{part}"] = measured.get(part, {}).get("kl")
    return {name: _finite(found[name]) for name in COLUMNS}


def csv_text(rows: Sequence[Row]) -> str:
    """All figures in full; an empty cell where there is none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*rows[0].swept, *COLUMNS, "status", "folder"])
    for row in rows:
        writer.writerow([*row.swept.values(), *row.figures.values(), row.status, row.folder])
    return text.getvalue()


def cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """(headings, cells by row) for people: rounded, a dash where there is no figure."""
    headings = [heading for heading, _ in COLUMNS.values()]
    lines = [
        [
            *row.swept.values(),
            *(_shown(row.figures[name], form) for name, (_, form) in COLUMNS.items()),
            row.status,
            row.folder,
        ]
        for row in rows
    ]
    swept = [key.replace(".", ".\n") for key in rows[0].swept]
    return [*swept, *headings, "status", "folder"], lines


def text_table(rows: Sequence[Row]) -> str:
    """Plain text, one line per job."""
    headings, lines = cells(rows)
    align = ["right"] * (len(headings) - 2) + ["left", "left"]
    named = [[*line[:-1], Path(line[-1]).name] for line in lines]
    return tabulate([headings, [], *named], tablefmt="plain", colalign=align, disable_numparse=True)


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _finite(value: Any) -> float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None
