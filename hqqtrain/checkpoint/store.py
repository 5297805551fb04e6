"""`checkpoints/` of a run: which there are, which is the newest that is whole, which can go."""

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
    """The folder `root`, of which `keep_last` and the `keep_best` with the lowest loss stay."""

    root: Path
    keep_last: int
    keep_best: int = 0

    def folder(self, step: int) -> Path:
        """Where the checkpoint after `step` optimizer steps lies."""
        return self.root / checkpoint_name(step)

    def steps(self) -> list[int]:
        """The steps of all checkpoints, whole or not, ascending."""
        return checkpoint_steps(self.root)

    def newest(self) -> Checkpoint | None:
        """The newest one that is whole; None where there is none at all.

        Newer ones, which are damaged, are set aside under another name: they do not count among
        those that are kept. Raises UserError where all are damaged: to begin anew would be a
        surprise.
        """
        faults: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                found = read_checkpoint(self.folder(step))
            except DamagedError as error:
                logger.warning("%s; the checkpoint before it is tried", error)
                faults[step] = str(error)
                continue
            for damaged in faults:
                _replace(self.folder(damaged), self.root / f"damaged-{self.folder(damaged).name}")
            return found
        if not faults:
            return None
        told = "; ".join(faults.values())
        raise UserError(
            f"{self.root}: no checkpoint can be used: {told}. Take one from a backup, or begin "
            "anew with run.resume=never."
        )

    def tidy(self) -> None:
        """Deletes what killed processes have left half written or half deleted."""
        for path in (*self.root.glob(".step-*"), _going(self.root)):
            shutil.rmtree(path, ignore_errors=True)

    def prune(self) -> None:
        """Deletes what is not to be kept. A name goes first, so that none is seen half deleted."""
        steps = self.steps()
        losses = {step: loss for step in steps if (loss := self._loss(step)) is not None}
        best = sorted(losses, key=lambda step: (losses[step], -step))[: self.keep_best]
        for step in steps[: -self.keep_last]:
            if step not in best:
                _delete(self.folder(step))

    def _loss(self, step: int) -> float | None:
        """`eval/loss` of a checkpoint, if it was measured there."""
        try:
            state = json.loads((self.folder(step) / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return state.get("eval_loss")

    def clear(self) -> None:
        """Deletes all of them."""
        _delete(self.root)


def _delete(folder: Path) -> None:
    if folder.exists():
        _replace(folder, _going(folder))
        shutil.rmtree(_going(folder))


def _going(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.going")


def _replace(folder: Path, name: Path) -> None:
    shutil.rmtree(name, ignore_errors=True)
    folder.rename(name)
