"""Checkpoints during training: when one is due, its content, and rolling back to one."""

import logging
import time
from dataclasses import asdict
from typing import Any

from hqqtrain.ckpt import (
    Background,
    Base,
    Checkpoint,
    load_adapter,
    versions,
    write_checkpoint,
)  # fmt: skip
from hqqtrain.config import UserError
from hqqtrain.data import Sequences
from hqqtrain.dist import count, write_full
from hqqtrain.tasks.plan import Plan
from hqqtrain.tasks.prepare import Built
from hqqtrain.tasks.record import Record
from hqqtrain.tasks.resume import open_newest, texts_of
from hqqtrain.train.loop import Trainer
from hqqtrain.train.progress import Trained
from hqqtrain.train.session import Session
from hqqtrain.train.snapshot import Snapshot

logger = logging.getLogger(__name__)

_BYTES = 12
"""Upper bound of checkpoint bytes per trainable parameter: fp32 value and two moments."""


class Keeper:
    """Saves and restores the state of `trainer`. Use it as a context manager.

    Training waits only while the state is copied; the first rank writes it in the background. All
    methods are collective.
    """

    def __init__(self, trainer: Trainer, plan: Plan, built: Built, session: Session,
                 record: Record, held_out: Sequences | None) -> None:  # fmt: skip
        self._trainer, self._plan, self._built = trainer, plan, built
        self._session, self._record, self._store = session, record, record.checkpoints
        self._snapshot = Snapshot(session.processes)
        self._background = Background("checkpoints")
        self._saved: int | None = None  # step of the last checkpoint
        self._texts = texts_of(trainer.sequences, held_out)
        self._saves, self._seconds = 0, 0.0  # the seconds are those that training has waited
        parameters = sum(map(count, trainer.trained.values()))
        session.interrupt.expects(_BYTES * parameters)

    def __enter__(self) -> "Keeper":
        return self

    def __exit__(self, *_: object) -> None:
        self._background.close()

    def resume(self, checkpoint: Checkpoint | None) -> None:
        """Restore the trainer from `checkpoint`; the model has the adapter of it already.

        Without a checkpoint, save one if a non-finite batch may require a rollback to step 0.
        """
        if checkpoint:
            self._restore(checkpoint)
            self._saved = checkpoint.step
        elif self._session.config.train.on_nonfinite == "rollback":
            self.save()

    def after_step(self, eval_loss: float | None) -> None:
        """Save a checkpoint if one is due after this step, then stop if the run was asked to.

        Args:
            eval_loss: The held-out loss, if it was measured after this step.

        Raises:
            PreemptedError: The run was asked to stop; the checkpoint is on disk.
            UserError: The run was asked to stop, but the checkpoint could not be written.
        """
        config, step = self._session.config.ckpt, self._trainer.done.steps
        is_due = self._trainer.is_over or (config.every is not None and step % config.every == 0)
        may_be_best = config.keep_best > 0 and eval_loss is not None
        if is_due or may_be_best or self._trainer.is_asked_to_stop:
            self.save(eval_loss)
        if self._trainer.is_asked_to_stop:
            self._require_written()
            self._session.interrupt.stop(self._session.processes)

    def save(self, eval_loss: float | None = None) -> None:
        """Copy the state of all ranks; the first rank writes it while training continues."""
        began = time.perf_counter()
        self.end()
        self._snapshot.take(self._trainer.engine.pieces())
        state = self._state(eval_loss)
        if self._session.processes.is_main:
            self._background.start(lambda: self._write(state))
        self._saved = state["step"]
        self._trainer.guard.passed()
        self._saves += 1
        self._seconds += time.perf_counter() - began

    def end(self) -> None:
        """Wait until the last checkpoint is on disk; log an error if it could not be written.

        A failed write does not end the training.
        """
        with self._session.processes.together():
            if error := self._wait():
                logger.error(
                    "the checkpoint of step %s was not written (%s); the previous one is kept and "
                    "training continues",
                    self._saved,
                    error,
                )

    def report(self) -> None:
        """Log how long training has waited for checkpoints."""
        share = 100 * self._seconds / max(self._trainer.done.seconds, 1e-9)
        logger.info(
            "training waited %.2f s for %d checkpoints, %.2f %% of its time",
            self._seconds,
            self._saves,
            share,
        )

    def roll_back(self) -> None:
        """Restore adapter, optimizer and counters from the newest checkpoint.

        Raises:
            UserError: The last checkpoint could not be written.
        """
        self._require_written()
        checkpoint = open_newest(self._store, self._session)
        assert checkpoint, "`resume` saves one before the first step"
        weights = load_adapter(checkpoint.folder).state
        for name, param in self._trainer.trained.items():
            write_full(param, weights[name])
        self._restore(checkpoint)
        logger.warning("rolled back to the checkpoint of step %d", checkpoint.step)

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        with self._session.processes.together():
            optimizer = checkpoint.optimizer()
        self._trainer.engine.load_optimizer(optimizer, state["updates"])
        self._trainer.done = Trained(**state["trained"])
        if scaler := self._session.accelerator.scaler:
            scaler.load_state_dict(state["scaler"])

    def _state(self, eval_loss: float | None) -> dict[str, Any]:
        session, scaler = self._session, self._session.accelerator.scaler
        return {
            "step": self._trainer.done.steps,
            "trained": asdict(self._trainer.done),
            "updates": self._trainer.engine.updates,
            "scaler": scaler.state_dict() if scaler else None,
            "eval_loss": eval_loss,
            "texts": self._texts,
            "strategy": session.strategy,
            "world_size": session.processes.size,
            "record": self._record.state(),
            "versions": versions(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }

    def _write(self, state: dict[str, Any]) -> None:
        """Write a checkpoint and delete old ones. Runs on the background thread."""
        began = time.perf_counter()
        tensors = self._snapshot.tensors()
        adapter = {name: tensors[name] for name in self._trainer.trained}
        optimizer = {name: tensor for name, tensor in tensors.items() if name not in adapter}
        assert self._plan.lora is not None
        base = Base(self._plan.source.name, self._session.config.model.revision,
                    self._built.settings.fingerprint)  # fmt: skip
        folder = self._store.folder(state["step"])
        write_checkpoint(folder, adapter, optimizer, self._plan.lora, base, state)
        self._session.interrupt.write_took(time.perf_counter() - began)
        try:
            self._store.prune()
        except OSError as error:
            logger.warning("older checkpoints were not deleted: %s", error)

    def _require_written(self) -> None:
        """Wait until the last checkpoint is on disk.

        Raises:
            UserError: It could not be written.
        """
        with self._session.processes.together():
            if error := self._wait():
                raise UserError(
                    f"{self._store.root}: the checkpoint of step {self._saved} was not written "
                    f"({error}), and the run needs it to continue; free some space there."
                ) from error

    def _wait(self) -> OSError | None:
        """Wait for the background write and return its error, if any."""
        try:
            self._background.wait()
        except OSError as error:
            return error
        return None
