"""How each job ended, also those that failed before they had a directory to say so in."""

import csv
import io
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from hqqtrain.common.exit_codes import DONE, PREEMPTED
from hqqtrain.common.files import atomic_write
from hqqtrain.compose.job import Job
from hqqtrain.launch.slurm.requeue import read_attempt
from hqqtrain.launch.sweep.sweep import Sweep
from hqqtrain.rundir.schema import (
    MODEL_NAMES,
    ModelFigures,
    QuantizeFigures,
    Summary,
    TrainFigures,
    read_json,
)

_BY_CODE = {DONE: "done", PREEMPTED: "preempted", None: "unfinished"}

_BY_STATUS = {"running": "unfinished"}
"""Of a job that runs, or was killed and could not say so."""


class JobResults:
    """The sweep's jobs.json: exit code and time (seconds since 1970) by the job's name."""

    def __init__(self, sweep: Sweep) -> None:
        self._file = sweep.folder / "jobs.json"
        self._found = {k: v for k, v in read_json(self._file).items() if _is_sound(v)}

    def record(self, job: Job, code: int) -> None:
        """`job` has just ended with `code`."""
        self._found[job.name] = {"exit_code": code, "time": time.time()}

    def save(self) -> None:
        """Writes what was recorded."""
        atomic_write(self._file, json.dumps(self._found, indent=2) + "\n")

    def state(self, job: Job) -> str:
        """done, failed, preempted, unfinished or pending, by what was said last.

        That is our record, that of its batch job, or its own status.json, for it may also run
        without us. It is done only where it says so itself.
        """
        said = job.status().status
        by_itself = _BY_STATUS.get(said, said) if isinstance(said, str) else "pending"
        records = [r for r in (self._found.get(job.name), read_attempt(job.folder)) if r]
        last = max(records, key=lambda record: record["time"], default=None)
        if last is None or last["time"] < _time_of(job):
            return by_itself
        state = _BY_CODE.get(last["exit_code"], "failed")
        started = state == "unfinished" and by_itself == "pending"
        return by_itself if state in ("done", "unfinished") and not started else state


def _is_sound(record: Any) -> bool:
    kinds = {"exit_code": int, "time": int | float}
    return isinstance(record, dict) and all(isinstance(record.get(k), t) for k, t in kinds.items())


def _time_of(job: Job) -> float:
    try:
        return job.layout.status_json.stat().st_mtime
    except OSError:
        return 0.0


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
class TableRow:
    """A job: its values of the swept keys and, where it is done, its figures."""

    swept: dict[str, str]
    figures: dict[str, float | None]
    status: str
    folder: str


def table_rows(sweep: Sweep, outcomes: JobResults | None = None) -> list[TableRow]:
    """A row for every job, whatever has become of it; `outcomes` if they are not all saved yet."""
    outcomes, rows = outcomes or JobResults(sweep), []
    for job in sweep.jobs:
        state = outcomes.state(job)
        found = summary_figures(job.summary() if state == "done" else Summary())
        rows.append(TableRow(sweep.values(job), found, state, str(job.folder)))
    return rows


def summary_figures(summary: Summary) -> dict[str, float | None]:
    """Return the figures that COLUMNS names; None where one was not measured or is not finite."""
    quantize, train = summary.quantize or QuantizeFigures(), summary.train or TrainFigures()
    peaks = [p for p in (quantize.peak_memory_gib, train.peak_memory_gib) if p is not None]
    found = {
        "bits_per_weight": quantize.bits_per_weight,
        "relative_error": quantize.relative_error,
        "quantize_seconds": quantize.seconds,
        "train_seconds": train.seconds,
        "peak_memory_gib": max(peaks, default=None),
        "tokens_per_second": train.tokens_per_second,
    }
    models = summary.models()
    for key in MODEL_NAMES:
        figures = models.get(key, ModelFigures())
        found |= {f"perplexity_{key}": figures.perplexity, f"kl_{key}": figures.kl}
    return {name: _finite(found[name]) for name in COLUMNS}


def csv_text(rows: Sequence[TableRow]) -> str:
    """All figures in full; an empty cell where there is none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*rows[0].swept, *COLUMNS, "status", "folder"])
    for row in rows:
        writer.writerow([*row.swept.values(), *row.figures.values(), row.status, row.folder])
    return text.getvalue()


def table_cells(rows: Sequence[TableRow]) -> tuple[list[str], list[list[str]]]:
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


def text_table(rows: Sequence[TableRow]) -> str:
    """Plain text, one line per job."""
    headings, lines = table_cells(rows)
    align = ["right"] * (len(headings) - 2) + ["left", "left"]
    named = [[*line[:-1], Path(line[-1]).name] for line in lines]
    return tabulate([headings, [], *named], tablefmt="plain", colalign=align, disable_numparse=True)


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _finite(value: Any) -> float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None
