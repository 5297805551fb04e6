"""Decide whether a run resumes, and from which checkpoint; the same on every rank."""

import logging
from collections.abc import Callable, Mapping

from hqqtrain.checkpoint.format import Checkpoint, read_checkpoint
from hqqtrain.checkpoint.store import CheckpointStore
from hqqtrain.common.errors import UserError
from hqqtrain.data.packing import TokenSequences
from hqqtrain.distributed.comm import Communicator
from hqqtrain.formats.manifest import DamagedError

logger = logging.getLogger(__name__)


def find_checkpoint(
    store: CheckpointStore, comm: Communicator, *, must_exist: bool,
    has_finished_run: Callable[[], bool],
) -> Checkpoint | None:  # fmt: skip
    """Return the checkpoint to resume from, or None if training starts at step 0. Collective.

    Args:
        store: The checkpoints of the run.
        comm: All ranks of the run.
        must_exist: Whether the user requires a checkpoint (`run.resume=must`).
        has_finished_run: Whether the directory has a finished run. A collective, called only if the
            store is empty.

    Raises:
        UserError: `must_exist`, and no checkpoint exists; all checkpoints are damaged; or the
            directory has a finished run that has kept no checkpoint.
    """
    found = load_latest(store, comm)
    if found is None and must_exist:
        raise UserError(f"run.resume=must: {store.root} has no checkpoint; use auto to start.")
    if found is None and has_finished_run():
        raise UserError(
            f"{store.root.parent}: has a finished run, and no checkpoint to resume from with other "
            "settings; choose another run.name, or run.resume=never."
        )
    if found is None or not found.step:  # a checkpoint of step 0 has nothing to restore
        return None
    if comm.is_main:
        logger.info(
            "resuming from %s, saved by %s on %d processes",
            found.folder,
            found.state["strategy"],
            found.state["world_size"],
        )
    return found


def load_latest(store: CheckpointStore, comm: Communicator) -> Checkpoint | None:
    """Load the newest undamaged checkpoint; None if the store is empty. Collective.

    The first rank chooses it, and every rank reads it.

    Raises:
        UserError: All checkpoints are damaged, or a rank cannot read the chosen one.
    """
    with comm.raise_on_all_ranks():
        mine = None
        if comm.is_main:
            store.delete_partial()
            mine = store.newest_intact()
    step = comm.gather(mine and mine.step)[0]
    with comm.raise_on_all_ranks():
        if step is None or mine:
            return mine
        try:
            return read_checkpoint(store.folder(step))
        except DamagedError as error:
            raise UserError(
                f"{error}, on this machine; all nodes need one shared folder."
            ) from error


def dataset_digests(training: TokenSequences, held_out: TokenSequences | None) -> dict[str, str]:
    """Return a digest of each dataset by the configuration key that names it."""
    return {
        "data.source": training.digest(),
        "eval.source": held_out.digest() if held_out else "",
    }


def check_resumable(found: Checkpoint | None, digests: Mapping[str, str], total_steps: int) -> None:
    """Check that training can resume from `found` with this data and this number of steps.

    Args:
        found: The checkpoint; None is always fine.
        digests: Of the run's datasets, from `dataset_digests`.
        total_steps: Number of steps of the run.

    Raises:
        UserError: The checkpoint was trained on other text, or has more steps than this run.
    """
    if found is None:
        return
    for key, digest in digests.items():
        if found.state["texts"][key] != digest:
            raise UserError(
                f"{found.folder}: was trained with other text than {key} gives now: a file, or the "
                "Python that provides it, has changed. Choose another run.name, or "
                "run.resume=never."
            )
    if found.step > total_steps:
        raise UserError(
            f"{found.folder}: has {found.step} steps, and train.max_steps or epochs ask for "
            f"{total_steps}; ask for more, or choose another run.name."
        )
