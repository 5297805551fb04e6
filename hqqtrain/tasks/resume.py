"""Whether a run goes on from a checkpoint, and from which: the same on every rank."""

import logging

from hqqtrain.ckpt import Checkpoint, CheckpointStore, DamagedError, read_checkpoint
from hqqtrain.config import RunConfig, UserError
from hqqtrain.data import SampleOrder, Sequences
from hqqtrain.tasks.record import Record
from hqqtrain.train.loop import total_steps
from hqqtrain.train.session import Session

logger = logging.getLogger(__name__)


def find_checkpoint(record: Record, session: Session) -> Checkpoint | None:
    """What `run.resume` makes this run go on from; None: it begins anew. Collective.

    Raises UserError where there is none though there must be, or none that is whole.
    """
    store, resume = record.checkpoints, session.config.run.resume
    if record.history.begins_anew:
        return None
    found = open_newest(store, session)
    if found is None and resume == "must":
        raise UserError(f"run.resume=must: {store.root} holds no checkpoint; use auto to begin.")
    if found is None and record.history.was_finished():
        raise UserError(
            f"{store.root.parent}: holds a finished run and no checkpoint to go on from with other "
            "settings; choose another run.name, or run.resume=never."
        )
    if found is None or not found.step:  # before the first step there is nothing
        return None
    if session.processes.is_main:
        logger.info("going on from %s, made by %s on %d processes", found.folder,
                    found.state["strategy"], found.state["world_size"])  # fmt: skip
    return found


def open_newest(store: CheckpointStore, session: Session) -> Checkpoint | None:
    """The newest checkpoint that is whole: the first rank chooses, every rank reads. Collective."""
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
        return _read(store, step)


def _read(store: CheckpointStore, step: int) -> Checkpoint:
    try:
        return read_checkpoint(store.folder(step))
    except DamagedError as error:
        raise UserError(f"{error}, on this machine; all nodes need one shared folder.") from error


def texts_of(training: Sequences, held_out: Sequences | None) -> dict[str, str]:
    """What tells one run's texts from another's, by the key that names them."""
    return {
        "data.source": training.digest(),
        "eval.source": held_out.digest() if held_out else "",
    }


def check_goes_on(
    found: Checkpoint | None, training: Sequences, held_out: Sequences | None, config: RunConfig
) -> None:
    """Raises UserError where the run of `found` had other text, or is past the end of this one."""
    if found is None:
        return
    for key, digest in texts_of(training, held_out).items():
        if found.state["texts"][key] != digest:
            raise UserError(
                f"{found.folder}: was made with other text than {key} gives now: a file, or the "
                "Python that brings it, has changed. Choose another run.name, or run.resume=never."
            )
    steps = total_steps(config, SampleOrder(len(training), config.train.seed))
    if found.step > steps:
        raise UserError(
            f"{found.folder}: has {found.step} steps, and train.max_steps or epochs ask for "
            f"{steps}; ask for more, or choose another run.name."
        )
