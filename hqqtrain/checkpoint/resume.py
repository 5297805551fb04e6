"""Whether a run goes on from a checkpoint, and from which: the same on every rank."""

import logging

from hqqtrain.checkpoint.format import Checkpoint, read_checkpoint
from hqqtrain.checkpoint.store import CheckpointStore
from hqqtrain.common.errors import UserError
from hqqtrain.config.run import RunConfig
from hqqtrain.data.order import SampleOrder
from hqqtrain.data.packing import TokenSequences
from hqqtrain.distributed.runtime import Runtime
from hqqtrain.formats.manifest import DamagedError
from hqqtrain.tasks.recorder import RunRecorder
from hqqtrain.train.trainer import total_steps

logger = logging.getLogger(__name__)


def find_checkpoint(recorder: RunRecorder, runtime: Runtime) -> Checkpoint | None:
    """What `run.resume` makes this run go on from; None: it begins anew. Collective.

    Raises UserError where there is none though there must be, or none that is whole.
    """
    store, resume = recorder.checkpoints, runtime.config.run.resume
    if recorder.history.starts_over:
        return None
    found = load_latest(store, runtime)
    if found is None and resume == "must":
        raise UserError(f"run.resume=must: {store.root} holds no checkpoint; use auto to begin.")
    if found is None and recorder.history.was_finished():
        raise UserError(
            f"{store.root.parent}: holds a finished run and no checkpoint to go on from with other "
            "settings; choose another run.name, or run.resume=never."
        )
    if found is None or not found.step:  # before the first step there is nothing
        return None
    if runtime.comm.is_main:
        logger.info("going on from %s, made by %s on %d processes", found.folder,
                    found.state["strategy"], found.state["world_size"])  # fmt: skip
    return found


def load_latest(store: CheckpointStore, runtime: Runtime) -> Checkpoint | None:
    """The newest checkpoint that is whole: the first rank chooses, every rank reads. Collective."""
    comm = runtime.comm
    with comm.raise_on_all_ranks():
        mine = None
        if comm.is_main:
            store.tidy()
            mine = store.newest()
    step = comm.gather(mine and mine.step)[0]
    with comm.raise_on_all_ranks():
        if step is None or mine:
            return mine
        return _read(store, step)


def _read(store: CheckpointStore, step: int) -> Checkpoint:
    try:
        return read_checkpoint(store.folder(step))
    except DamagedError as error:
        raise UserError(f"{error}, on this machine; all nodes need one shared folder.") from error


def dataset_digests(training: TokenSequences, held_out: TokenSequences | None) -> dict[str, str]:
    """What tells one run's texts from another's, by the key that names them."""
    return {
        "data.source": training.digest(),
        "eval.source": held_out.digest() if held_out else "",
    }


def check_resumable(
    found: Checkpoint | None,
    training: TokenSequences,
    held_out: TokenSequences | None,
    config: RunConfig,
) -> None:
    """Raises UserError where the run of `found` had other text, or is past the end of this one."""
    if found is None:
        return
    for key, digest in dataset_digests(training, held_out).items():
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
