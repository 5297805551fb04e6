"""The state that earlier processes of a run have left in its directory.

Only the first rank reads it and broadcasts the answer: a shared file system may show a new file to
other machines seconds later, and all ranks must take the same decision.
"""

import logging
import os
import shutil

from hqqtrain.ckpt import CheckpointStore, RunDirectory
from hqqtrain.dist import Processes
from hqqtrain.track import forget_run_id

logger = logging.getLogger(__name__)

_RESULTS = ("adapter", "nonfinite", "report", "summary.json")
"""Results of the previous run, deleted when a run starts from scratch in the same directory."""


class History:
    """The previous processes of the run in `directory`, which the first rank has locked.

    All methods are collective.
    """

    def __init__(
        self, directory: RunDirectory, checkpoints: CheckpointStore, processes: Processes
    ) -> None:
        self._directory, self._checkpoints = directory, checkpoints
        self._processes = processes
        self.begins_anew = processes.on_main(self._starts_from_scratch)
        """Whether `run.resume=never` applies to this process."""

    def _starts_from_scratch(self) -> bool:
        """Whether to ignore the previous run.

        A job that slurm has requeued after it began resumes even with `run.resume=never`.
        """
        job = os.environ.get("SLURM_JOB_ID")
        is_requeued = job is not None and self._directory.status().get("slurm_job") == job
        return self._directory.config.run.resume == "never" and not is_requeued

    def is_done(self) -> bool:
        """Whether this run has finished before; logs it."""
        done = not self.begins_anew and self._processes.on_main(self._directory.done)
        if done:
            logger.info("%s is done already: see summary.json there.", self._directory.path)
        return done

    def was_finished(self) -> bool:
        """Whether the directory has a finished run whose configuration may be resumed as this one.

        The number of steps, for example, may differ.
        """
        return self._processes.on_main(self._directory.is_finished)

    def has_quantized(self) -> bool:
        """Whether `quantized/` is complete and made from the present source files."""
        if self.begins_anew:
            return False
        return self._processes.on_main(lambda: self._directory.holds("quantized"))

    def forget(self) -> None:
        """Delete checkpoints, results and the W&B id of the previous run if `begins_anew`."""
        if self.begins_anew:
            self._processes.on_main(self._delete)

    def _delete(self) -> None:
        if self._checkpoints.steps():
            logger.warning("run.resume=never: %s is deleted", self._checkpoints.root)
        self._checkpoints.clear()
        for path in (self._directory.path / name for name in _RESULTS):
            path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
        forget_run_id(self._directory.path)
