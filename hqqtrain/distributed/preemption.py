"""Preemption: stop all ranks together after a signal on any rank, or before a time limit.

slurm sends SIGUSR1 before a job's end, and SIGTERM when another job takes its nodes. A signal may
reach a single rank at any moment, so the ranks act on it where they communicate anyway.
"""

import logging
import os
import subprocess
import time
from datetime import datetime
from typing import NoReturn

import psutil

from hqqtrain.common import signals
from hqqtrain.common.env import get_rank, get_slurm_job_id
from hqqtrain.common.errors import PreemptedError
from hqqtrain.config.infra import RunDirConfig, parse_seconds
from hqqtrain.distributed.comm import Communicator

logger = logging.getLogger(__name__)

SLOW_DISK_BYTES_PER_SECOND = 50e6
"""Bytes per second of a slow disk, such as one shared with other users."""

SPARE_SECONDS = 5.0
"""Seconds reserved before a time limit, in addition to a step and a checkpoint."""


class PreemptionHandler:
    """Decides whether this rank must stop. Only rank 0 watches slurm's time limit.

    Args:
        config: Its `time_limit` replaces that of slurm.
    """

    def __init__(self, config: RunDirConfig) -> None:
        self._deadline, self._limit_name = _deadline(config)  # seconds since 1970
        self._longest_step = self._longest_write = self._write_estimate = 0.0  # seconds
        self._limit_is_near = False

    def expect_checkpoint_bytes(self, size: int) -> None:
        """Estimate the time to write a checkpoint of `size` bytes, until one was written."""
        self._write_estimate = size / SLOW_DISK_BYTES_PER_SECOND

    def record_step_seconds(self, seconds: float) -> None:
        """Note the time of an optimizer step."""
        self._longest_step = max(self._longest_step, seconds)

    def record_write_seconds(self, seconds: float) -> None:
        """Note the time to write a checkpoint."""
        self._longest_write = max(self._longest_write, seconds)

    @property
    def stop_reason(self) -> str:
        """Why this rank must stop; empty if it need not."""
        if name := signals.received_signal():
            return f"{name} was received"
        # Reserve two steps, because the longest may be yet to come, and two checkpoint writes: the
        # rest of a running one and a whole one.
        reserved = 2 * (self._longest_step + (self._longest_write or self._write_estimate))
        # Once near, the limit stays near, even if a checkpoint takes less time than estimated.
        self._limit_is_near |= time.time() + reserved + SPARE_SECONDS > self._deadline
        return f"{self._limit_name} is nearly reached" if self._limit_is_near else ""

    def check(self, comm: Communicator) -> None:
        """Stop all ranks if any of them must stop. Collective.

        Raises:
            PreemptedError: On every rank.
        """
        if comm.all_reduce_sum([bool(self.stop_reason)])[0]:
            self.raise_preempted(comm)

    def check_local(self) -> None:
        """Stop this rank if it has received a signal.

        The caller must report the error to the other ranks.

        Raises:
            PreemptedError: On this rank only.
        """
        if signals.received_signal():
            raise PreemptedError(self.stop_reason)

    def raise_preempted(self, comm: Communicator) -> NoReturn:
        """Stop all ranks, with the reason of the lowest rank that has one. Collective.

        Raises:
            PreemptedError: Always.
        """
        reasons = comm.all_gather_object(self.stop_reason)
        rank, reason = next((r for r in enumerate(reasons) if r[1]), (0, "it was asked to stop"))
        raise PreemptedError(reason if rank == 0 else f"rank {rank}: {reason}")


def _deadline(config: RunDirConfig) -> tuple[float, str]:
    """Return (seconds since 1970, name of the limit); infinity and "" without a limit."""
    if config.time_limit is not None:
        start = psutil.Process().create_time()
        return start + parse_seconds(config.time_limit), f"run.time_limit={config.time_limit}"
    job = get_slurm_job_id()
    if job and get_rank() == 0:
        return _end_of_job(job), "slurm's time limit"
    return float("inf"), ""


def _end_of_job(job: str) -> float:
    """Return when slurm ends `job`, in seconds since 1970; infinity without a limit.

    Not every version of slurm has it in the environment, so ask squeue.
    """
    if end := os.environ.get("SLURM_JOB_END_TIME"):
        return float(end)
    command = ["squeue", "--noheader", "--job", job, "--format", "%e"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return datetime.fromisoformat(answer.stdout.strip()).timestamp()
    except (OSError, ValueError, subprocess.SubprocessError):  # squeue prints N/A without a limit
        return float("inf")
