"""How each job ended, also those that failed before they had a directory to say so in."""

import json
import time

from hqqtrain.config.atomic import atomic_write
from hqqtrain.sweep.job import DONE, PREEMPTED, Job, read_json
from hqqtrain.sweep.sweep import Sweep

_BY_CODE = {DONE: "done", PREEMPTED: "preempted"}
_BY_STATUS = {"running": "unfinished"}
"""Of a job that runs, or was killed and could not say so."""


class Outcomes:
    """The sweep's jobs.json: exit code and time (seconds since 1970) by the job's name."""

    def __init__(self, sweep: Sweep) -> None:
        self._file = sweep.folder / "jobs.json"
        self._found = read_json(self._file)

    def record(self, job: Job, code: int) -> None:
        """`job` has just ended with `code`."""
        self._found[job.name] = {"exit_code": code, "time": time.time()}

    def save(self) -> None:
        """Writes what was recorded."""
        atomic_write(self._file, json.dumps(self._found, indent=2) + "\n")

    def state(self, job: Job) -> str:
        """done, failed, preempted, unfinished or pending, by what was said last.

        That is our record or the job's own status.json, for it may also run without us.
        """
        recorded, said = self._found.get(job.name), job.status().get("status")
        if recorded and recorded["time"] >= _time_of(job):
            return _BY_CODE.get(recorded["exit_code"], "failed")
        return _BY_STATUS.get(said, said) if said else "pending"


def _time_of(job: Job) -> float:
    try:
        return (job.folder / "status.json").stat().st_mtime
    except OSError:
        return 0.0
