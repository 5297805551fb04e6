"""Whether a run goes on from a checkpoint, and from which: the same on every rank."""

import logging

from hqqtrain.ckpt import Checkpoint, CheckpointStore, DamagedError, read_checkpoint
from hqqtrain.config import RunConfig, UserError
from hqqtrain.data import SampleOrder, Sequences
from hqqtrain.train.loop import total_steps
from hqqtrain.train.record import Record
from hqqtrain.train.session import Session

logger = logging.getLogger(__name__)


def find_checkpoint(record: Record, session: Session) -> Checkpoint | None:
    """What `run.resume` makes this run go on from; None: it begins anew. Collective.

    Raises UserError where there is none though there must be, or none that is whole.
    """
    store, resume = record.checkpoints, session.config.run.resume
    if resume == "never":
        with session.processes.together():
            if session.processes.is_main and store.steps():
                logger.warning("run.resume=never: %s is deleted", store.root)
                store.clear()
        return None
    found = open_newest(store, session)
    if found is None and resume == "must":
        raise UserError(f"run.resume=must: {store.root} holds no checkpoint; use auto to begin.")
    if found is None and session.processes.gather(record.was_finished)[0]:
        raise UserError(
            f"{store.root.parent}: holds a finished run and no checkpoint to go on from with other "
            "settings; choose another run.name, or run.resume=never."
        )
    if found and session.processes.is_main:
        logger.info("going on from %s, made by %s on %d processes", found.folder,
                    found.state["strategy"], found.state["world_size"])  # fmt: skip
    return found


def open_newest(store: CheckpointStore, session: Session) -> Checkpoint | None:
    """The newest checkpoint that is whole: the first rank chooses, every rank reads. Collective."""
    processes = session.processes
    with processes.together():
        mine = store.newest() if processes.is_main else None
    step = processes.gather(mine and mine.step)[0]
    with processes.together():
        if step is None or mine:
            return mine
        return _read(store, step)


def _read(store: CheckpointStore, step: int) -> Checkpoint:
    try:
        return read_checkpoint(store.folder(step))
    except DamagedError as error:
        raise UserError(f"{error}, on this machine; all nodes need one shared folder.") from error


def check_goes_on(found: Checkpoint | None, sequences: Sequences, config: RunConfig) -> None:
    """Raises UserError where the run of `found` had other text, or is past the end of this one."""
    if found is None:
        return
    if found.state["data"] != sequences.digest():
        raise UserError(
            f"{found.folder}: was trained on other text than data.source gives now: a file or the "
            "Python that brings it has changed. Choose another run.name, or run.resume=never."
        )
    steps = total_steps(config, SampleOrder(len(sequences), config.train.seed))
    if found.step > steps:
        raise UserError(
            f"{found.folder}: has {found.step} steps, and train.max_steps or epochs ask for "
            f"{steps}; ask for more, or choose another run.name."
        )
