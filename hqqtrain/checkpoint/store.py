"""The checkpoints of a run: find the newest intact one, and delete those that are not kept."""

import logging
from dataclasses import dataclass
from pathlib import Path

from hqqtrain.checkpoint.format import STATE, Checkpoint, read_checkpoint
from hqqtrain.common.errors import UserError
from hqqtrain.common.files import remove
from hqqtrain.common.reading import load_json
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

    def best_intact(self, below: float) -> Checkpoint | None:
        """Return the intact checkpoint with the lowest `eval/loss`, if that is less than `below`.

        Damaged checkpoints are passed over with a warning.
        """
        for step, loss in self._by_loss():
            if loss >= below:
                return None
            try:
                return read_checkpoint(self.folder(step))
            except DamagedError as error:
                logger.warning("%s; trying the next best checkpoint", error)
        return None

    def delete_partial(self) -> None:
        """Delete the partial folders that killed processes have left."""
        for path in (*self.root.glob(".step-*"), _deletion_path(self.root)):
            remove(path)

    def prune(self) -> None:
        """Delete all checkpoints except the newest and the best ones.

        A folder is renamed before it is deleted, so that nobody sees a partial checkpoint.
        """
        steps = self.steps()
        best = [step for step, _ in self._by_loss()[: self.keep_best]]
        for step in steps[: max(0, len(steps) - self.keep_last)]:
            if step not in best:
                _delete(self.folder(step))

    def _by_loss(self) -> list[tuple[int, float]]:
        """Return (step, `eval/loss`) of the checkpoints that have recorded it, the best first.

        With equal losses, the later step counts as better.
        """
        losses = ((step, self._read_loss(step)) for step in self.steps())
        measured = [(step, loss) for step, loss in losses if loss is not None]
        return sorted(measured, key=lambda item: (item[1], -item[0]))

    def _read_loss(self, step: int) -> float | None:
        """Return the `eval/loss` that a checkpoint has recorded, or None if it has none."""
        try:
            loss = load_json(self.folder(step) / STATE)["eval_loss"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return loss if isinstance(loss, int | float) else None

    def delete_all(self) -> None:
        """Delete all checkpoints."""
        _delete(self.root)


def _delete(folder: Path) -> None:
    if folder.exists():
        _replace(folder, _deletion_path(folder))
        remove(_deletion_path(folder))


def _deletion_path(folder: Path) -> Path:
    """Return the name that a folder has while it is being deleted."""
    return folder.with_name(f".{folder.name}.going")


def _replace(source: Path, target: Path) -> None:
    """Rename `source` to `target`, in place of a folder that is there already."""
    remove(target)
    source.rename(target)
