"""The checkpoints of a run: find the newest intact one, and delete those that are not kept."""

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from hqqtrain.checkpoint.format import STATE, Checkpoint, read_checkpoint
from hqqtrain.common.errors import UserError
from hqqtrain.formats.manifest import DamagedError
from hqqtrain.rundir.layout import checkpoint_name, checkpoint_steps

logger = logging.getLogger(__name__)


@dataclass
class CheckpointStore:
    """The folder `root` of checkpoints.

    `prune` keeps the `keep_last` newest and the `keep_best` with the lowest `eval/loss`.
    """

    root: Path
    keep_last: int
    keep_best: int = 0

    def folder(self, step: int) -> Path:
        """Return the folder of the checkpoint after `step` optimizer steps."""
        return self.root / checkpoint_name(step)

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, damaged ones included, in ascending order."""
        return checkpoint_steps(self.root)

    def newest_intact(self) -> Checkpoint | None:
        """Return the newest intact checkpoint, or None if there are no checkpoints.

        Newer checkpoints, which are damaged, are renamed so that `prune` does not count them.

        Raises:
            UserError: all checkpoints are damaged. Starting from scratch would be a surprise.
        """
        faults: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                found = read_checkpoint(self.folder(step))
            except DamagedError as error:
                logger.warning("%s; trying the previous checkpoint", error)
                faults[step] = str(error)
                continue
            for damaged in faults:
                _replace(self.folder(damaged), self.root / f"damaged-{self.folder(damaged).name}")
            return found
        if not faults:
            return None
        raise UserError(
            f"{self.root}: no checkpoint can be used: {'; '.join(faults.values())}. Restore one "
            "from a backup, or start from scratch with run.resume=never."
        )

    def delete_partial(self) -> None:
        """Delete the partial folders that killed processes have left."""
        for path in (*self.root.glob(".step-*"), _deletion_path(self.root)):
            shutil.rmtree(path, ignore_errors=True)

    def prune(self) -> None:
        """Delete all checkpoints except those to keep.

        A folder is renamed before it is deleted, so that nobody sees a partial checkpoint.
        """
        steps = self.steps()
        losses = {step: loss for step in steps if (loss := self._loss(step)) is not None}
        # With equal losses, the later step counts as better.
        best = sorted(losses, key=lambda step: (losses[step], -step))[: self.keep_best]
        for step in steps[: -self.keep_last]:
            if step not in best:
                _delete(self.folder(step))

    def _loss(self, step: int) -> float | None:
        """Return the `eval/loss` of a checkpoint, or None if it was not measured there."""
        try:
            state = json.loads((self.folder(step) / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return state.get("eval_loss")

    def delete_all(self) -> None:
        """Delete all checkpoints."""
        _delete(self.root)


def _delete(folder: Path) -> None:
    if folder.exists():
        _replace(folder, _deletion_path(folder))
        shutil.rmtree(_deletion_path(folder))


def _deletion_path(folder: Path) -> Path:
    """Return the name that a folder has while it is being deleted."""
    return folder.with_name(f".{folder.name}.going")


def _replace(folder: Path, name: Path) -> None:
    shutil.rmtree(name, ignore_errors=True)
    folder.rename(name)
