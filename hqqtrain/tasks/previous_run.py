"""Read what earlier processes of a run have left in its directory.

Only rank 0 reads the directory; it broadcasts each answer. All ranks must decide the same, and a
shared file system may show a new file to other machines seconds later.
"""

import logging

from hqqtrain.checkpoint.format import Checkpoint
from hqqtrain.checkpoint.store import CheckpointStore
from hqqtrain.common.env import get_slurm_job_id
from hqqtrain.common.errors import UserError
from hqqtrain.common.files import remove
from hqqtrain.distributed.comm import Communicator
from hqqtrain.rundir.directory import RunDirectory
from hqqtrain.rundir.identity import SOURCE_KEY, describe_other_settings
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

    def has_quantized(self, source_digest: str) -> bool:
        """Whether `quantized/` is complete and was made from the source with this digest."""
        if self.starts_over:
            return False
        return self._comm.run_on_rank0(
            lambda: self._directory.matches_source("quantized", source_digest)
        )

    def check_checkpoint(self, checkpoint: Checkpoint | None, source_digest: str) -> None:
        """Check that `checkpoint` belongs to this run and to the files that it reads now.

        Checkpoints of the first release record neither the configuration nor the model. Text that
        has changed is found by its tokens, see `check_resumable`.

        Raises:
            UserError: The checkpoint was copied from a run of another configuration, or a file has
                changed since.
        """
        if checkpoint is None:
            return
        config = self._directory.config
        saved, model = checkpoint.state.get("config"), checkpoint.state.get("model")
        if isinstance(saved, dict) and (differences := describe_other_settings(saved, config)):
            raise UserError(
                f"{checkpoint.folder}: belongs to a run of another configuration: {differences}. "
                "Move it back to its own run; or choose another run.name, or run.resume=never."
            )
        changed = self._comm.run_on_rank0(self._directory.changed_inputs)
        keys = [key for key in changed if key == "adapter.init_from"]
        if model not in (None, source_digest):
            keys.append(SOURCE_KEY)
        if keys:
            values = {
                SOURCE_KEY: config.model.name_or_path,
                "adapter.init_from": config.adapter.init_from,
            }
            shown = ", ".join(f"{key}={values[key]}" for key in keys)
            raise UserError(
                f"{shown}: its files are not those that {checkpoint.folder} was trained from. "
                "Restore the files; or choose another run.name, or run.resume=never, to train with "
                "the new ones."
            )

    def delete_results(self) -> None:
        """Delete checkpoints, results and the W&B id of the previous run if `starts_over`."""
        if self.starts_over:
            self._comm.run_on_rank0(self._delete_results)

    def _delete_results(self) -> None:
        if self._checkpoints.steps():
            logger.warning("run.resume=never: %s is deleted", self._checkpoints.root)
        self._checkpoints.delete_all()
        layout = self._directory.layout
        for path in (
            layout.adapter, layout.nonfinite, layout.profile, layout.report, layout.summary_json,
        ):  # fmt: skip
            remove(path)
        delete_run_id(self._directory.path)
