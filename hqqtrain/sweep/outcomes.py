"""How each job ended, also those that failed before they had a directory to say so in."""

import json
import time
from typing import Any

from hqqtrain.config.atomic import atomic_write
from hqqtrain.config.codes import DONE, PREEMPTED
from hqqtrain.launch.attempt import note_of
from hqqtrain.sweep.job import Job, read_json
from hqqtrain.sweep.sweep import Sweep

_BY_CODE = {DONE: "done", PREEMPTED: "preempted", None: "unfinished"}
_BY_STATUS = {"running": "unfinished"}
"""Of a job that runs, or was killed and could not say so."""


class Outcomes:
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
        said = job.status().get("status")
        by_itself = _BY_STATUS.get(said, said) if isinstance(said, str) else "pending"
        records = [r for r in (self._found.get(job.name), note_of(job.folder)) if r]
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
        return (job.folder / "status.json").stat().st_mtime
    except OSError:
        return 0.0
