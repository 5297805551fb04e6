"""Being asked to stop: by a signal on any rank, or by a time limit. All ranks stop together.

slurm sends SIGUSR1 before a job's end and SIGTERM when another job takes its nodes. A signal
reaches one rank at one moment; what it asks for happens where all ranks meet anyway.
"""

import logging
import os
import subprocess
import time
from datetime import datetime

import psutil

from hqqtrain.config import PreemptedError, RunSection, signals
from hqqtrain.config.durations import seconds
from hqqtrain.dist import Processes

logger = logging.getLogger(__name__)

SPARE = 5.0
"""Seconds kept back before a time limit, beside what a step and a checkpoint take."""


class Interrupt:
    """What this rank knows of a wish to stop. A time limit is the first rank's to know."""

    def __init__(self, config: RunSection) -> None:
        self._deadline, self._limit = _deadline(config)
        self._needed = 0.0

    def needs(self, taken: float) -> None:
        """Before a time limit there must be room for what took `taken` seconds, twice."""
        self._needed = max(self._needed, taken)

    @property
    def reason(self) -> str:
        """Why this rank wants to stop; empty where it does not."""
        if name := signals.received():
            return f"{name} was received"
        is_near = time.time() + 2 * self._needed + SPARE > self._deadline
        return f"{self._limit} is nearly reached" if is_near else ""

    def check(self, processes: Processes) -> None:
        """Raises PreemptedError on every rank if any was asked to stop. Collective."""
        if processes.sum([bool(self.reason)])[0]:
            raise self.error()

    def check_alone(self) -> None:
        """Raises PreemptedError where this rank has had a signal: where others hear of it."""
        if signals.received():
            raise self.error()

    def error(self) -> PreemptedError:
        """What to raise, once all ranks know."""
        return PreemptedError(self.reason or "another rank was asked to stop")


def _deadline(config: RunSection) -> tuple[float, str]:
    """(seconds since 1970, what says so): of `run.time_limit`, or else of slurm; or none."""
    if config.time_limit is not None:
        began = psutil.Process().create_time()
        return began + seconds(config.time_limit), f"run.time_limit={config.time_limit}"
    if "SLURM_JOB_ID" in os.environ and os.environ.get("RANK", "0") == "0":
        return _end_of_job(os.environ["SLURM_JOB_ID"]), "slurm's time limit"
    return float("inf"), ""


def _end_of_job(job: str) -> float:
    """When slurm ends `job`, seconds since 1970. Not every version says so in the environment."""
    if end := os.environ.get("SLURM_JOB_END_TIME"):
        return float(end)
    command = ["squeue", "--noheader", "--job", job, "--format", "%e"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return datetime.fromisoformat(said.stdout.strip()).timestamp()
    except (OSError, ValueError, subprocess.SubprocessError):  # N/A: there is no limit
        return float("inf")
