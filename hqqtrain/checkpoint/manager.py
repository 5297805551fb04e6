"""Checkpoints during training: when one is due, its content, and rolling back to one."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from peft import LoraConfig

from hqqtrain.checkpoint.format import Checkpoint, write_checkpoint
from hqqtrain.checkpoint.resume import load_latest
from hqqtrain.checkpoint.snapshot import StateSnapshot
from hqqtrain.checkpoint.store import CheckpointStore
from hqqtrain.common.errors import UserError
from hqqtrain.common.text import count
from hqqtrain.common.threads import BackgroundExecutor
from hqqtrain.config.infra import CheckpointConfig
from hqqtrain.distributed.comm import Communicator
from hqqtrain.distributed.local import global_numel
from hqqtrain.distributed.preemption import PreemptionHandler
from hqqtrain.formats.adapter_base import BaseModelRef
from hqqtrain.training.trainer import Trainer

logger = logging.getLogger(__name__)

_BYTES_PER_PARAMETER = 12
"""Upper bound of checkpoint bytes per trainable parameter: fp32 value and two moments."""


class Stateful(Protocol):
    """A part of a run whose state a checkpoint keeps, as in `torch.distributed.checkpoint`."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` has returned, perhaps in another process."""


@dataclass(frozen=True)
class CheckpointContents:
    """The parts of a checkpoint besides the state of the trainer.

    Attributes:
        lora: Configuration of the trained adapter, for `adapter_config.json`.
        base: The model that the adapter belongs to.
        parts: Further parts of the run by their key in `state.json`.
        constants: Constants of the run by their key in `state.json`.
    """

    lora: LoraConfig
    base: BaseModelRef
    parts: Mapping[str, Stateful]
    constants: Mapping[str, Any]


class CheckpointManager:
    """Saves and restores the state of `trainer`. Use it as a context manager.

    Training waits only while the state is copied; rank 0 writes the copy in the background. All
    methods are collective.

    Args:
        trainer: The trainer. Its state gives the top-level keys of `state.json`.
        contents: The other contents of a checkpoint. The manager saves the parts but does not
            restore them, because a task needs them before a trainer exists.
        store: The folder of the checkpoints.
        config: When a checkpoint is due.
        comm: All ranks of the run.
        preemption: Learns how long a checkpoint takes, and stops the run.
    """

    def __init__(
        self,
        trainer: Trainer,
        contents: CheckpointContents,
        store: CheckpointStore,
        config: CheckpointConfig,
        comm: Communicator,
        preemption: PreemptionHandler,
    ) -> None:
        self._trainer, self._contents, self._store = trainer, contents, store
        self._config, self._comm, self._preemption = config, comm, preemption
        self._snapshot = StateSnapshot(comm)
        self._background = BackgroundExecutor("checkpoints")
        self._saved_step: int | None = None
        self._num_saves, self._seconds_waited = 0, 0.0
        num_parameters = sum(map(global_numel, trainer.trainable_parameters.values()))
        preemption.expect_checkpoint_bytes(_BYTES_PER_PARAMETER * num_parameters)

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(self, *_: object) -> None:
        self._background.close()

    def resume(self, checkpoint: Checkpoint | None) -> None:
        """Restore the trainer from `checkpoint`, whose parameters the model has already.

        Without a checkpoint, save one if a non-finite batch may require a rollback to step 0.
        """
        if checkpoint:
            with self._comm.raise_on_all_ranks():
                tensors = checkpoint.optimizer()
            self._trainer.load_state_dict(checkpoint.state | {"tensors": tensors})
            self._saved_step = checkpoint.step
        elif self._trainer.guard.rolls_back:
            self.save()

    def after_step(self, eval_loss: float | None, *, stop_requested: bool) -> None:
        """Save a checkpoint if one is due after this step, then stop if the run was asked to.

        Args:
            eval_loss: The held-out loss, if it was measured after this step.
            stop_requested: Whether any rank was asked to stop; the same on all ranks.

        Raises:
            PreemptedError: The run was asked to stop; the checkpoint is on disk.
            UserError: The run was asked to stop, but the checkpoint could not be written.
        """
        every, step = self._config.every, self._trainer.state.steps
        is_due = self._trainer.is_over or (every is not None and step % every == 0)
        may_be_best = self._config.num_best > 0 and eval_loss is not None
        if is_due or may_be_best or stop_requested:
            self.save(eval_loss)
        if stop_requested:
            self._require_written()
            self._preemption.raise_preempted(self._comm)

    def save_before_stop(self, eval_loss: float | None) -> None:
        """Save a checkpoint of the last step, unless there is one, because the run must stop.

        Args:
            eval_loss: The held-out loss, if it was measured after this step.

        Raises:
            UserError: The checkpoint could not be written.
        """
        if self._trainer.state.steps not in (0, self._saved_step):
            self.save(eval_loss)
        self._require_written()

    def save(self, eval_loss: float | None = None) -> None:
        """Copy the state of all ranks; rank 0 writes it while training continues."""
        start = time.perf_counter()
        self.wait_for_write()
        state = self._trainer.state_dict()
        self._snapshot.take(state.pop("tensors"))
        state |= {name: part.state_dict() for name, part in self._contents.parts.items()}
        state |= {**self._contents.constants, "eval_loss": eval_loss}
        state["time"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        if self._comm.is_main:
            self._background.start(lambda: self._write(state))
        self._saved_step = state["step"]
        self._trainer.guard.checkpoint_saved()
        self._num_saves += 1
        self._seconds_waited += time.perf_counter() - start

    def wait_for_write(self) -> None:
        """Wait until the last checkpoint is on disk; log an error if it could not be written.

        A failed write does not end the training.
        """
        with self._comm.raise_on_all_ranks():
            if error := self._write_error():
                logger.error(
                    "the checkpoint of step %s was not written (%s); the previous one is kept and "
                    "training continues",
                    self._saved_step,
                    error,
                )

    def log_waiting_time(self) -> None:
        """Log how long training has waited for checkpoints."""
        percent = 100 * self._seconds_waited / max(self._trainer.state.seconds, 1e-9)
        logger.info(
            "training waited %.2f s for %s, %.2f %% of its time",
            self._seconds_waited,
            count(self._num_saves, "checkpoint"),
            percent,
        )

    def roll_back(self) -> Checkpoint:
        """Restore parameters, optimizer and counters from the newest checkpoint, and return it.

        Raises:
            UserError: The last checkpoint could not be written.
        """
        self._require_written()
        checkpoint = load_latest(self._store, self._comm)
        assert checkpoint, "`resume` saves one before the first step"
        with self._comm.raise_on_all_ranks():
            tensors = checkpoint.parameters() | checkpoint.optimizer()
        self._trainer.load_state_dict(checkpoint.state | {"tensors": tensors})
        logger.warning("rolled back to the checkpoint of step %d", checkpoint.step)
        return checkpoint

    def _write(self, state: dict[str, Any]) -> None:
        """Write a checkpoint and delete old ones. Runs on the background thread."""
        start = time.perf_counter()
        tensors = self._snapshot.tensors()
        adapter = {name: tensors[name] for name in self._trainer.trainable_parameters}
        optimizer = {name: tensor for name, tensor in tensors.items() if name not in adapter}
        folder = self._store.folder(state["step"])
        write_checkpoint(
            folder, adapter, optimizer, self._contents.lora, self._contents.base, state
        )
        self._preemption.record_write_seconds(time.perf_counter() - start)
        try:
            self._store.prune()
        except OSError as error:
            logger.warning("older checkpoints were not deleted: %s", error)

    def _require_written(self) -> None:
        """Wait until the last checkpoint is on disk.

        Raises:
            UserError: It could not be written.
        """
        with self._comm.raise_on_all_ranks():
            if error := self._write_error():
                raise UserError(
                    f"{self._store.root}: the checkpoint of step {self._saved_step} was not "
                    f"written ({error}), and the run needs it to continue; free some space there."
                ) from error

    def _write_error(self) -> OSError | None:
        """Wait for the background write and return its error, if any."""
        try:
            self._background.wait()
        except OSError as error:
            return error
        return None
