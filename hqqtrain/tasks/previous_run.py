"""The state that earlier processes of a run have left in its directory.

Only the first rank reads it and broadcasts the answer: a shared file system may show a new file to
other machines seconds later, and all ranks must take the same decision.
"""

import logging
import shutil

from hqqtrain.checkpoint.store import CheckpointStore
from hqqtrain.common.env import get_slurm_job_id
from hqqtrain.distributed.comm import Communicator
from hqqtrain.rundir.directory import RunDirectory
from hqqtrain.tracking.wandb import delete_run_id

logger = logging.getLogger(__name__)


class PreviousRun:
    """The previous processes of the run in `directory`, which the first rank has locked.

    All methods are collective.
    """

    def __init__(
        self, directory: RunDirectory, checkpoints: CheckpointStore, comm: Communicator
    ) -> None:
        self._directory, self._checkpoints = directory, checkpoints
        self._comm = comm
        self.starts_over = comm.run_on_rank0(self._starts_from_scratch)
        """Whether `run.resume=never` applies to this process."""

    def _starts_from_scratch(self) -> bool:
        """Whether to ignore the previous run.

        A job that slurm has requeued after it began resumes even with `run.resume=never`.
        """
        job = get_slurm_job_id()
        is_requeued = job is not None and self._directory.read_status().slurm_job == job
        return self._directory.config.run.resume == "never" and not is_requeued

    def is_done(self) -> bool:
        """Whether this run has finished before; logs it."""
        done = not self.starts_over and self._comm.run_on_rank0(
            self._directory.is_finished_as_configured
        )
        if done:
            logger.info("%s is done already: see summary.json there.", self._directory.path)
        return done

    def has_finished_run(self) -> bool:
        """Whether the directory has a finished run whose configuration may be resumed as this one.

        The number of steps, for example, may differ.
        """
        return self._comm.run_on_rank0(self._directory.is_finished)

    def has_quantized(self) -> bool:
        """Whether `quantized/` is complete and made from the present source files."""
        if self.starts_over:
            return False
        return self._comm.run_on_rank0(lambda: self._directory.matches_source("quantized"))

    def delete_results(self) -> None:
        """Delete checkpoints, results and the W&B id of the previous run if `starts_over`."""
        if self.starts_over:
            self._comm.run_on_rank0(self._delete_results)

    def _delete_results(self) -> None:
        if self._checkpoints.steps():
            logger.warning("run.resume=never: %s is deleted", self._checkpoints.root)
        self._checkpoints.delete_all()
        layout = self._directory.layout
        for path in (layout.adapter, layout.nonfinite, layout.report, layout.summary_json):
            path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
        delete_run_id(self._directory.path)
