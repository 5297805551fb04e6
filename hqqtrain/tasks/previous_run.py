"""What earlier processes of a run have left in its directory, told alike to every rank.

The first rank looks: other machines may see a folder some seconds late.
"""

import logging
import os
import shutil

from hqqtrain.checkpoint.store import CheckpointStore
from hqqtrain.distributed.comm import Communicator
from hqqtrain.rundir.directory import RunDirectory
from hqqtrain.tracking.wandb_run_id import forget_run_id

logger = logging.getLogger(__name__)

_RESULTS = ("adapter", "nonfinite", "report", "summary.json")
"""Of a run, that one which begins anew in its place would be taken to have made."""


class PreviousRun:
    """Of `directory`, which the first rank has locked. All methods are collective."""

    def __init__(
        self, directory: RunDirectory, checkpoints: CheckpointStore, comm: Communicator
    ) -> None:
        self._directory, self._checkpoints = directory, checkpoints
        self._comm = comm
        self.starts_over = comm.run_on_rank0(self._begins_anew)
        """Whether `run.resume=never` holds."""

    def _begins_anew(self) -> bool:
        """Not for a job that slurm has requeued after it had begun."""
        job = os.environ.get("SLURM_JOB_ID")
        is_requeued = job is not None and self._directory.status().slurm_job == job
        return self._directory.config.run.resume == "never" and not is_requeued

    def is_done(self) -> bool:
        """Whether this run was finished before; says so."""
        done = not self.starts_over and self._comm.run_on_rank0(self._directory.done)
        if done:
            logger.info("%s is done already: see summary.json there.", self._directory.path)
        return done

    def was_finished(self) -> bool:
        """Whether it is a finished run's, of this configuration or nearly so."""
        return self._comm.run_on_rank0(self._directory.is_finished)

    def has_quantized(self) -> bool:
        """Whether this run has quantized before, from the files that are there now."""
        if self.starts_over:
            return False
        return self._comm.run_on_rank0(lambda: self._directory.holds("quantized"))

    def forget(self) -> None:
        """Deletes what a run that begins anew leaves behind of the one before."""
        if self.starts_over:
            self._comm.run_on_rank0(self._forget)

    def _forget(self) -> None:
        if self._checkpoints.steps():
            logger.warning("run.resume=never: %s is deleted", self._checkpoints.root)
        self._checkpoints.clear()
        for path in (self._directory.path / name for name in _RESULTS):
            path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
        forget_run_id(self._directory.path)
