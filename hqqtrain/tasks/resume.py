"""Decide whether a run resumes, and from which checkpoint; the same on every rank."""

import logging

from hqqtrain.ckpt import Checkpoint, CheckpointStore, DamagedError, read_checkpoint
from hqqtrain.config import RunConfig, UserError
from hqqtrain.data import SampleOrder, Sequences
from hqqtrain.tasks.record import Record
from hqqtrain.train.loop import total_steps
from hqqtrain.train.session import Session

logger = logging.getLogger(__name__)


def find_checkpoint(record: Record, session: Session) -> Checkpoint | None:
    """Return the checkpoint to resume from, or None if training starts at step 0. Collective.

    Raises:
        UserError: `run.resume=must` and no checkpoint exists; all checkpoints are damaged; or the
            directory has a finished run that has kept no checkpoint.
    """
    store, resume = record.checkpoints, session.config.run.resume
    if record.history.begins_anew:
        return None
    found = open_newest(store, session)
    if found is None and resume == "must":
        raise UserError(f"run.resume=must: {store.root} has no checkpoint; use auto to start.")
    if found is None and record.history.was_finished():
        raise UserError(
            f"{store.root.parent}: has a finished run, and no checkpoint to resume from with other "
            "settings; choose another run.name, or run.resume=never."
        )
    if found is None or not found.step:  # a checkpoint of step 0 has nothing to restore
        return None
    if session.processes.is_main:
        logger.info(
            "resuming from %s, saved by %s on %d processes",
            found.folder,
            found.state["strategy"],
            found.state["world_size"],
        )
    return found


def open_newest(store: CheckpointStore, session: Session) -> Checkpoint | None:
    """Load the newest undamaged checkpoint; None if the store is empty. Collective.

    The first rank chooses it, and every rank reads it.

    Raises:
        UserError: All checkpoints are damaged, or a rank cannot read the chosen one.
    """
    processes = session.processes
    with processes.together():
        mine = None
        if processes.is_main:
            store.tidy()
            mine = store.newest()
    step = processes.gather(mine and mine.step)[0]
    with processes.together():
        if step is None or mine:
            return mine
        try:
            return read_checkpoint(store.folder(step))
        except DamagedError as error:
            raise UserError(
                f"{error}, on this machine; all nodes need one shared folder."
            ) from error


def texts_of(training: Sequences, held_out: Sequences | None) -> dict[str, str]:
    """Return a digest of each dataset by the configuration key that names it."""
    return {
        "data.source": training.digest(),
        "eval.source": held_out.digest() if held_out else "",
    }


def check_goes_on(
    found: Checkpoint | None, training: Sequences, held_out: Sequences | None, config: RunConfig
) -> None:
    """Check that training can resume from `found` with this data and this number of steps.

    Raises:
        UserError: The checkpoint was trained on other text, or has more steps than this run.
    """
    if found is None:
        return
    for key, digest in texts_of(training, held_out).items():
        if found.state["texts"][key] != digest:
            raise UserError(
                f"{found.folder}: was trained with other text than {key} gives now: a file, or the "
                "Python that provides it, has changed. Choose another run.name, or "
                "run.resume=never."
            )
    steps = total_steps(config, SampleOrder(len(training), config.train.seed))
    if found.step > steps:
        raise UserError(
            f"{found.folder}: has {found.step} steps, and train.max_steps or epochs ask for "
            f"{steps}; ask for more, or choose another run.name."
        )
