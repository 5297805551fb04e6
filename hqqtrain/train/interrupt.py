"""Being asked to stop: by a signal on any rank, or by a time limit. All ranks stop together.

slurm sends SIGUSR1 before a job's end and SIGTERM when another job takes its nodes. A signal
reaches one rank at one moment; what it asks for happens where all ranks meet anyway.
"""

import logging
import os
import signal
import time
from types import FrameType

import psutil

from hqqtrain.config import PreemptedError, RunSection
from hqqtrain.config.durations import seconds
from hqqtrain.dist import Processes

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
SPARE = 5.0
"""Seconds kept back before a time limit, beside what a step and a checkpoint take."""


class Interrupt:
    """What this rank knows of a wish to stop."""

    def __init__(self, config: RunSection) -> None:
        self._deadline, self._limit = _deadline(config)
        self._needed = 0.0
        self.reason = ""

    def listen(self) -> None:
        """From now on SIGUSR1 and SIGTERM ask for an end; a second one is the end, at once."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def needs(self, taken: float) -> None:
        """Before a time limit there must be room for what took `taken` seconds, twice."""
        self._needed = max(self._needed, taken)

    @property
    def is_asked(self) -> bool:
        """Whether this rank was asked to stop, or the time is nearly up."""
        if not self.reason and time.time() + 2 * self._needed + SPARE > self._deadline:
            self.reason = self._limit
        return bool(self.reason)

    def check(self, processes: Processes) -> None:
        """Raises PreemptedError on every rank if any was asked to stop. Collective."""
        if processes.sum([self.is_asked])[0]:
            raise self.error()

    def check_alone(self) -> None:
        """Raises PreemptedError where this rank has had a signal: where others hear of it."""
        if self.reason and self.reason != self._limit:
            raise self.error()

    def error(self) -> PreemptedError:
        """What to raise, once all ranks know."""
        return PreemptedError(self.reason or "another rank was asked to stop")

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.reason:
            os._exit(1)
        self.reason = f"{signal.Signals(number).name} was received"


def _deadline(config: RunSection) -> tuple[float, str]:
    """(seconds since 1970, what says so): of `run.time_limit` or slurm, whichever is earlier."""
    limits = [(float("inf"), "")]
    if config.time_limit is not None:
        began = psutil.Process().create_time()
        limits.append((began + seconds(config.time_limit), f"run.time_limit={config.time_limit}"))
    elif end := os.environ.get("SLURM_JOB_END_TIME"):
        limits.append((float(end), "slurm's time limit"))
    return min(limits)
