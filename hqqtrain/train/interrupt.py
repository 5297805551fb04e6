"""Being asked to stop: by a signal on any rank, or by a time limit. All ranks stop together.

slurm sends SIGUSR1 before a job's end and SIGTERM when another job takes its nodes. A signal
reaches one rank at one moment; what it asks for happens where all ranks meet anyway.
"""

import logging
import os
import subprocess
import time
from datetime import datetime
from typing import NoReturn

import psutil

from hqqtrain.config import PreemptedError, RunSection, signals
from hqqtrain.config.durations import seconds
from hqqtrain.dist import Processes

logger = logging.getLogger(__name__)

SLOW_DISK = 50e6
"""Bytes a second, of a shared one that others use, too."""
SPARE = 5.0
"""Seconds kept back before a time limit, beside what a step and a checkpoint take."""


class Interrupt:
    """What this rank knows of a wish to stop. A time limit is the first rank's to know."""

    def __init__(self, config: RunSection) -> None:
        self._deadline, self._limit = _deadline(config)
        self._steps, self._writes = 0.0, 0.0
        self._guess = 0.0
        self._is_near = False

    def expects(self, size: int) -> None:
        """A checkpoint has `size` bytes: a guess at its time, until one was written."""
        self._guess = size / SLOW_DISK

    def step_took(self, seconds: float) -> None:
        self._steps = max(self._steps, seconds)

    def write_took(self, seconds: float) -> None:
        """Of a checkpoint."""
        self._writes = max(self._writes, seconds)

    @property
    def reason(self) -> str:
        """Why this rank wants to stop; empty where it does not."""
        if name := signals.received():
            return f"{name} was received"
        # once near it stays so: a checkpoint may take less than was feared
        self._is_near |= time.time() + self._room() + SPARE > self._deadline
        return f"{self._limit} is nearly reached" if self._is_near else ""

    def _room(self) -> float:
        """Seconds to end in: a step, the rest of a checkpoint's writing, and a whole one; twice
        the steps, for the longest may be yet to come."""
        return 2 * (self._steps + (self._writes or self._guess))

    def check(self, processes: Processes) -> None:
        """Raises PreemptedError on every rank if any was asked to stop. Collective."""
        if processes.sum([bool(self.reason)])[0]:
            self.stop(processes)

    def check_alone(self) -> None:
        """Raises PreemptedError where this rank has had a signal: where others hear of it."""
        if signals.received():
            raise PreemptedError(self.reason)

    def stop(self, processes: Processes) -> NoReturn:
        """Raises PreemptedError, once all ranks know: with the reason of the first that has one.
        Collective."""
        reasons = processes.gather(self.reason)
        rank, reason = next((r for r in enumerate(reasons) if r[1]), (0, "it was asked to stop"))
        raise PreemptedError(reason if rank == 0 else f"rank {rank}: {reason}")


def _deadline(config: RunSection) -> tuple[float, str]:
    """(seconds since 1970, what says so): of `run.time_limit`, or else of slurm; or none."""
    if config.time_limit is not None:
        began = psutil.Process().create_time()
        return began + seconds(config.time_limit), f"run.time_limit={config.time_limit}"
    if "SLURM_JOB_ID" in os.environ and os.environ.get("RANK", "0") == "0":
        return _end_of_job(), "slurm's time limit"
    return float("inf"), ""


def _end_of_job() -> float:
    """When slurm ends ours, seconds since 1970. Not every version says so in the environment."""
    if end := os.environ.get("SLURM_JOB_END_TIME"):
        return float(end)
    job = os.environ["SLURM_JOB_ID"]
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):  # whose id may stand for all of its tasks
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    command = ["squeue", "--noheader", "--job", job, "--format", "%e"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return datetime.fromisoformat(said.stdout.strip()).timestamp()
    except (OSError, ValueError, subprocess.SubprocessError):  # N/A: there is no limit
        return float("inf")
