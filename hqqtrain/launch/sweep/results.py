"""The states of a sweep's jobs, and the table of their results.

A job may fail before it has a run directory, so the sweep keeps a record of how each job ended.
"""

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
from hqqtrain.common.reading import read_json
from hqqtrain.compose.job import Job
from hqqtrain.launch.slurm.requeue import read_attempt
from hqqtrain.launch.sweep.lock import is_locked
from hqqtrain.launch.sweep.sweep import Sweep
from hqqtrain.rundir.schema import (
    MODEL_NAMES,
    ModelMetrics,
    QuantizeMetrics,
    Summary,
    TrainMetrics,
)

_STATE_BY_EXIT_CODE = {DONE: "done", PREEMPTED: "preempted", None: "unfinished"}
"""Every other exit code means "failed". None: the job has started and not ended."""

_STATE_BY_STATUS = {"running": "unfinished"}
"""States that have another name than the status: a killed process leaves the status "running"."""


class JobResults:
    """The sweep's jobs.json: job name -> exit code and its time (seconds since 1970).

    The exit code is null from the start of a job to its end.
    """

    def __init__(self, sweep: Sweep) -> None:
        self._file, self._sweep = sweep.folder / "jobs.json", sweep
        self._records = {k: v for k, v in read_json(self._file).items() if _is_valid_record(v)}

    def forget_start(self, job: Job) -> None:
        """Forget that an earlier attempt of the sweep has started `job` and did not see its end."""
        if self._records.get(job.name, {}).get("exit_code", 0) is None:
            del self._records[job.name]

    def record(self, job: Job, code: int | None) -> None:
        """Record that `job` has just ended with exit code `code`, or started if that is None."""
        self._records[job.name] = {"exit_code": code, "time": time.time()}

    def save(self) -> None:
        """Write all records to jobs.json."""
        atomic_write(self._file, json.dumps(self._records, indent=2) + "\n")

    def state(self, job: Job) -> str:
        """Return the state of `job`: running, done, failed, preempted, unfinished or pending.

        A job is running from its start to its end, as long as the sweep or one of its jobs lives.
        Otherwise, the newest of three sources decides: the sweep's own record, the record that a
        Slurm batch job keeps, and the run's status.json, because a job may also run outside of the
        sweep. A job counts as done only if its own status.json says so.
        """
        own = self._records.get(job.name)
        status = job.read_status().status
        by_status = _STATE_BY_STATUS.get(status, status) if isinstance(status, str) else "pending"
        if own and own["exit_code"] is None and is_locked(self._sweep):
            has_ended = by_status not in ("pending", "unfinished")
            return by_status if has_ended and _status_time(job) >= own["time"] else "running"
        records = [r for r in (own, read_attempt(job.folder)) if r]
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
    types: dict[str, Any] = {"exit_code": int | None, "time": int | float}
    return isinstance(record, dict) and all(
        name in record and isinstance(record[name], kind) for name, kind in types.items()
    )


def _status_time(job: Job) -> float:
    """Return the modification time of the job's status.json (seconds since 1970); 0 without one."""
    try:
        return job.layout.status_json.stat().st_mtime
    except OSError:
        return 0.0


COLUMNS = {
    "bits_per_weight": ("bits per\nweight", ".2f"),
    "relative_error": ("relative\nerror", ".4f"),
    "perplexity_full_precision": ("perplexity\nfull precision", ",.3f"),
    "perplexity_quantized": ("perplexity\nquantized", ",.3f"),
    "perplexity_final": ("perplexity\ntrained", ",.3f"),
    "kl_quantized": ("KL\nquantized", ".4f"),
    "kl_final": ("KL\ntrained", ".4f"),
    "quantize_seconds": ("quantize\nseconds", ".1f"),
    "train_seconds": ("train\nseconds", ".1f"),
    "peak_memory_gib": ("peak\nGiB", ".3f"),
    "tokens_per_second": ("tokens/s", ",.0f"),
}
"""Metric -> (heading of its column, format).

`quantize_seconds` of a job that reads quantized weights from the cache is their loading time.
"""

DATA_COLUMNS = {
    "examples": ("examples", ",.0f"),
    "trained_tokens": ("trained\ntokens", ",.0f"),
    "sequences": ("sequences", ",.0f"),
    "padding": ("padding", ".1%"),
    "truncated": ("truncated\nexamples", ",.0f"),
    "split": ("split\nexamples", ",.0f"),
}
"""The same for task=data, which measures nothing else."""


@dataclass(frozen=True)
class TableRow:
    """One job: its values of the swept keys and, if it is done, its metrics.

    The names of the metrics are those of `COLUMNS`, and for task=data of `DATA_COLUMNS`, too.
    """

    swept_values: dict[str, str]
    metrics: dict[str, float | None]
    status: str
    folder: str


def read_rows(sweep: Sweep, results: JobResults | None = None) -> list[TableRow]:
    """Return one row per job, whatever its state.

    `results` defaults to the saved ones; a caller with unsaved results passes them.
    """
    results, rows = results or JobResults(sweep), []
    for job in sweep.jobs:
        state = results.state(job)
        metrics = summary_metrics(job.read_summary() if state == "done" else Summary())
        rows.append(TableRow(sweep.swept_values(job), metrics, state, str(job.folder)))
    return rows


def summary_metrics(summary: Summary) -> dict[str, float | None]:
    """Return the metrics of a row; None where one was not measured or is not finite."""
    if summary.data:
        measured = {name: _finite(getattr(summary.data, name)) for name in DATA_COLUMNS}
        return dict.fromkeys(COLUMNS) | measured
    quantize, train = summary.quantize or QuantizeMetrics(), summary.train or TrainMetrics()
    peaks = [p for p in (quantize.peak_memory_gib, train.peak_memory_gib) if p is not None]
    metrics = {
        "bits_per_weight": quantize.bits_per_weight,
        "relative_error": quantize.relative_error,
        "quantize_seconds": quantize.seconds,
        "train_seconds": train.seconds,
        "peak_memory_gib": max(peaks, default=None),
        "tokens_per_second": train.tokens_per_second,
    }
    models = summary.measured_models()
    for key in MODEL_NAMES:
        model = models.get(key, ModelMetrics())
        metrics |= {f"perplexity_{key}": model.perplexity, f"kl_{key}": model.kl}
    return {name: _finite(metrics[name]) for name in COLUMNS}


def format_csv(rows: Sequence[TableRow]) -> str:
    """Return the table as CSV, with unrounded numbers and an empty cell for a missing one."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = _columns(rows)
    writer.writerow([*rows[0].swept_values, *columns, "status", "folder"])
    for row in rows:
        numbers = [row.metrics.get(name) for name in columns]
        writer.writerow([*row.swept_values.values(), *numbers, row.status, row.folder])
    return text.getvalue()


def format_cells(rows: Sequence[TableRow]) -> tuple[list[str], list[list[str]]]:
    """Return (headings, rows of cells) for people: rounded, with a dash for a missing number."""
    # A line break after the group keeps the columns of the swept keys narrow.
    swept_headings = [key.replace(".", ".\n") for key in rows[0].swept_values]
    columns = _columns(rows)
    headings = [heading for heading, _ in columns.values()]
    cells = []
    for row in rows:
        numbers = [_format_cell(row.metrics.get(name), spec) for name, (_, spec) in columns.items()]
        cells.append([*row.swept_values.values(), *numbers, row.status, row.folder])
    return [*swept_headings, *headings, "status", "folder"], cells


def _columns(rows: Sequence[TableRow]) -> dict[str, tuple[str, str]]:
    """Return the columns of the table: those of the task of the jobs, which have been measured."""
    measured = {name for row in rows for name, value in row.metrics.items() if value is not None}
    if not measured & DATA_COLUMNS.keys():
        return COLUMNS
    return COLUMNS | DATA_COLUMNS if measured & COLUMNS.keys() else DATA_COLUMNS


def _format_cell(value: float | None, format_spec: str) -> str:
    return "-" if value is None else format(value, format_spec)


def format_table(rows: Sequence[TableRow]) -> str:
    """Return the table as plain text, one line per job."""
    headings, cells = format_cells(rows)
    align = ["right"] * (len(headings) - 2) + ["left", "left"]
    lines = [[*row[:-1], Path(row[-1]).name] for row in cells]  # the name of the folder only
    return tabulate([headings, [], *lines], tablefmt="plain", colalign=align, disable_numparse=True)


def _finite(value: Any) -> float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None
