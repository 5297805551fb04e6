"""Read what earlier processes of a run have left in its directory.

Only rank 0 reads the directory; it broadcasts each answer. All ranks must decide the same, and a
shared file system may show a new file to other machines seconds later.
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
    """The earlier processes of the run in `directory`, which rank 0 has locked.

    All methods are collective.
    """

    def __init__(
        self, directory: RunDirectory, checkpoints: CheckpointStore, comm: Communicator
    ) -> None:
        self._directory, self._checkpoints = directory, checkpoints
        self._comm = comm
        self.starts_over = comm.run_on_rank0(self._starts_from_scratch)
        """Whether this process ignores and deletes the results of earlier ones."""

    def _starts_from_scratch(self) -> bool:
        """Whether `run.resume=never` applies to this process.

        It does not apply to a Slurm job that was requeued: the job resumes what it has begun.
        """
        job_id = get_slurm_job_id()
        is_requeued = job_id is not None and self._directory.read_status().slurm_job == job_id
        return self._directory.config.run.resume == "never" and not is_requeued

    def is_done(self) -> bool:
        """Whether an earlier process has finished this run; if so, a log line says it."""
        is_done = not self.starts_over and self._comm.run_on_rank0(
            self._directory.is_finished_as_configured
        )
        if is_done:
            logger.info("%s is done already: see summary.json there.", self._directory.path)
        return is_done

    def has_finished_run(self) -> bool:
        """Whether the directory has a finished run that this configuration may resume.

        The two configurations may differ in the number of steps, for example.
        """
        return self._comm.run_on_rank0(self._directory.is_finished)

    def has_quantized(self) -> bool:
        """Whether `quantized/` is complete and was made from the current source files."""
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
