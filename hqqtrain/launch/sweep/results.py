"""How each job of a sweep ended, including jobs that failed before they had a run directory."""

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

from hqqtrain.common.errors import DONE, PREEMPTED
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

_STATE_BY_EXIT_CODE = {DONE: "done", PREEMPTED: "preempted", None: "unfinished"}
"""Every other exit code means "failed". None: the job has started and not ended."""

_STATE_BY_STATUS = {"running": "unfinished"}
"""status.json says "running" while the job runs, and also after the process was killed."""


class JobResults:
    """The sweep's jobs.json: job name -> exit code and time (seconds since 1970)."""

    def __init__(self, sweep: Sweep) -> None:
        self._file = sweep.folder / "jobs.json"
        self._records = {k: v for k, v in read_json(self._file).items() if _is_valid_record(v)}

    def record(self, job: Job, code: int) -> None:
        """Record that `job` has just ended with exit code `code`."""
        self._records[job.name] = {"exit_code": code, "time": time.time()}

    def save(self) -> None:
        """Write all records to jobs.json."""
        atomic_write(self._file, json.dumps(self._records, indent=2) + "\n")

    def state(self, job: Job) -> str:
        """Return the state of `job`: done, failed, preempted, unfinished or pending.

        The newest of three sources decides: the sweep's own record, the record that a Slurm batch
        job keeps, and the run's status.json, because a job may also run outside of the sweep. A job
        counts as done only if its own status.json says so.
        """
        status = job.read_status().status
        by_status = _STATE_BY_STATUS.get(status, status) if isinstance(status, str) else "pending"
        records = [r for r in (self._records.get(job.name), read_attempt(job.folder)) if r]
        newest = max(records, key=lambda record: record["time"], default=None)
        if newest is None or newest["time"] < _status_time(job):
            return by_status
        by_record = _STATE_BY_EXIT_CODE.get(newest["exit_code"], "failed")
        # The record alone knows that a job failed, was preempted, or has started without having
        # written a status.json. In all other cases status.json is more precise.
        has_just_started = by_record == "unfinished" and by_status == "pending"
        if by_record in ("failed", "preempted") or has_just_started:
            return by_record
        return by_status


def _is_valid_record(record: Any) -> bool:
    types = {"exit_code": int, "time": int | float}
    return isinstance(record, dict) and all(isinstance(record.get(k), t) for k, t in types.items())


def _status_time(job: Job) -> float:
    """Modification time of the job's status.json; 0 if there is none."""
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
"""Figure -> (heading, format).

A job that reads quantized weights from the cache has their loading time as `quantize_seconds`.
"""


@dataclass(frozen=True)
class TableRow:
    """One job: its values of the swept keys and, if it is done, its figures."""

    swept_values: dict[str, str]
    figures: dict[str, float | None]
    status: str
    folder: str


def collect_rows(sweep: Sweep, results: JobResults | None = None) -> list[TableRow]:
    """Return one row per job, whatever its state.

    `results` defaults to the saved ones; a caller with unsaved results passes them.
    """
    results, rows = results or JobResults(sweep), []
    for job in sweep.jobs:
        state = results.state(job)
        found = summary_figures(job.read_summary() if state == "done" else Summary())
        rows.append(TableRow(sweep.swept_values(job), found, state, str(job.folder)))
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
    models = summary.measured_models()
    for key in MODEL_NAMES:
        figures = models.get(key, ModelFigures())
        found |= {f"perplexity_{key}": figures.perplexity, f"kl_{key}": figures.kl}
    return {name: _finite(found[name]) for name in COLUMNS}


def format_csv(rows: Sequence[TableRow]) -> str:
    """Return the table as CSV, with unrounded figures and an empty cell for a missing one."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*rows[0].swept_values, *COLUMNS, "status", "folder"])
    for row in rows:
        writer.writerow([*row.swept_values.values(), *row.figures.values(), row.status, row.folder])
    return text.getvalue()


def format_cells(rows: Sequence[TableRow]) -> tuple[list[str], list[list[str]]]:
    """Return (headings, rows of cells) for people: rounded, with a dash for a missing figure."""
    headings = [heading for heading, _ in COLUMNS.values()]
    lines = [
        [
            *row.swept_values.values(),
            *(
                "-" if (value := row.figures[name]) is None else format(value, spec)
                for name, (_, spec) in COLUMNS.items()
            ),
            row.status,
            row.folder,
        ]
        for row in rows
    ]
    swept = [key.replace(".", ".\n") for key in rows[0].swept_values]
    return [*swept, *headings, "status", "folder"], lines


def format_table(rows: Sequence[TableRow]) -> str:
    """Return the table as plain text, one line per job."""
    headings, lines = format_cells(rows)
    align = ["right"] * (len(headings) - 2) + ["left", "left"]
    short = [[*line[:-1], Path(line[-1]).name] for line in lines]  # the name of the folder only
    return tabulate([headings, [], *short], tablefmt="plain", colalign=align, disable_numparse=True)


def _finite(value: Any) -> float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None
