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
    """The folder of a run's checkpoints.

    Attributes:
        root: The folder.
        keep_last: Number of the newest checkpoints that `prune` keeps.
        keep_best: Number of the checkpoints with the lowest `eval/loss` that `prune` keeps.
    """

    root: Path
    keep_last: int
    keep_best: int = 0

    def folder(self, step: int) -> Path:
        """Return the folder of the checkpoint after `step` optimizer steps."""
        return self.root / checkpoint_name(step)

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints in ascending order.

        Damaged checkpoints count until `newest_intact` has renamed them.
        """
        return checkpoint_steps(self.root)

    def newest_intact(self) -> Checkpoint | None:
        """Return the newest intact checkpoint, or None if there are no checkpoints.

        The damaged checkpoints after it are renamed, so that `prune` does not count them.

        Raises:
            UserError: All checkpoints are damaged. The run does not start from scratch by itself,
                because the user expects it to resume.
        """
        damage: dict[int, str] = {}  # step -> message
        for step in reversed(self.steps()):
            try:
                checkpoint = read_checkpoint(self.folder(step))
            except DamagedError as error:
                logger.warning("%s; trying the previous checkpoint", error)
                damage[step] = str(error)
                continue
            for folder in map(self.folder, damage):
                _replace(folder, self.root / f"damaged-{folder.name}")
            return checkpoint
        if not damage:
            return None
        raise UserError(
            f"{self.root}: no checkpoint can be used: {'; '.join(damage.values())}. Restore one "
            "from a backup, or start from scratch with run.resume=never."
        )

    def delete_partial(self) -> None:
        """Delete the partial folders that killed processes have left."""
        for path in (*self.root.glob(".step-*"), _deletion_path(self.root)):
            shutil.rmtree(path, ignore_errors=True)

    def prune(self) -> None:
        """Delete all checkpoints except the newest and the best ones.

        A folder is renamed before it is deleted, so that nobody sees a partial checkpoint.
        """
        steps = self.steps()
        losses = {step: loss for step in steps if (loss := self._read_loss(step)) is not None}
        # With equal losses, the later step counts as better.
        best = sorted(losses, key=lambda step: (losses[step], -step))[: self.keep_best]
        for step in steps[: max(0, len(steps) - self.keep_last)]:
            if step not in best:
                _delete(self.folder(step))

    def _read_loss(self, step: int) -> float | None:
        """Return the `eval/loss` that a checkpoint has recorded, or None if it has none."""
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


def _replace(source: Path, target: Path) -> None:
    """Rename `source` to `target`, in place of a folder that is there already."""
    shutil.rmtree(target, ignore_errors=True)
    source.rename(target)
