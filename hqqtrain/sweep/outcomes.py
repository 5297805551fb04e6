"""How each job of a sweep ended, including jobs that failed before they had a run directory."""

import json
import time
from typing import Any

from hqqtrain.config.atomic import atomic_write
from hqqtrain.config.codes import DONE, PREEMPTED
from hqqtrain.launch.attempt import note_of
from hqqtrain.sweep.job import Job, read_json
from hqqtrain.sweep.sweep import Sweep

_STATE_BY_EXIT_CODE = {DONE: "done", PREEMPTED: "preempted", None: "unfinished"}
"""Every other exit code means "failed". None: the job has started and not ended."""
_STATE_BY_STATUS = {"running": "unfinished"}
"""status.json says "running" while the job runs, and also after the process was killed."""


class Outcomes:
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
        status = job.status().get("status")
        by_status = _STATE_BY_STATUS.get(status, status) if isinstance(status, str) else "pending"
        records = [r for r in (self._records.get(job.name), note_of(job.folder)) if r]
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
        return (job.folder / "status.json").stat().st_mtime
    except OSError:
        return 0.0
