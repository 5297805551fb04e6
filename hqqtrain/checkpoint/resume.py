"""Decide whether a run resumes, and from which checkpoint; the same on every rank."""

import logging
from collections.abc import Callable, Mapping

from hqqtrain.checkpoint.format import Checkpoint, read_checkpoint
from hqqtrain.checkpoint.store import CheckpointStore
from hqqtrain.common.errors import UserError
from hqqtrain.common.text import count
from hqqtrain.data.sequences import TokenSequences
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
        has_finished_run: Returns whether the directory has a finished run. It is collective, and is
            called only if the store is empty.

    Raises:
        UserError: No checkpoint exists although one must; all checkpoints are damaged; or the
            directory has a finished run that has kept no checkpoint.
    """
    latest = load_latest(store, comm)
    if latest is None and must_exist:
        raise UserError(f"run.resume=must: {store.root} has no checkpoint; use auto to start.")
    if latest is None and has_finished_run():
        raise UserError(
            f"{store.root.parent}: has a finished run, and no checkpoint to resume from with other "
            "settings or to write a missing result again; choose another run.name, or "
            "run.resume=never."
        )
    if latest is None or latest.step == 0:  # a checkpoint of step 0 has nothing to restore
        return None
    if comm.is_main:
        logger.info(
            "resuming from %s, saved by %s on %s",
            latest.folder,
            latest.state["strategy"],
            count(latest.state["world_size"], "process"),
        )
    return latest


def load_latest(store: CheckpointStore, comm: Communicator) -> Checkpoint | None:
    """Load the newest undamaged checkpoint; None if the store is empty. Collective.

    Raises:
        UserError: All checkpoints are damaged, or a rank cannot read the chosen one.
    """

    def choose() -> Checkpoint | None:
        store.delete_partial()
        return store.newest_intact()

    return _load_chosen(store, comm, choose)


def load_best(store: CheckpointStore, comm: Communicator, *, below: float) -> Checkpoint | None:
    """Load the undamaged checkpoint with the lowest `eval/loss`, if less than `below`. Collective.

    Raises:
        UserError: A rank cannot read the chosen checkpoint.
    """
    return _load_chosen(store, comm, lambda: store.best_intact(below))


def _load_chosen(
    store: CheckpointStore, comm: Communicator, choose: Callable[[], Checkpoint | None]
) -> Checkpoint | None:
    """Load the checkpoint that rank 0 chooses on every rank. Collective."""
    with comm.raise_on_all_ranks():
        checkpoint = choose() if comm.is_main else None
    step = comm.all_gather_object(checkpoint and checkpoint.step)[0]
    with comm.raise_on_all_ranks():
        if step is None or comm.is_main:  # rank 0 has read the checkpoint already
            return checkpoint
        try:
            return read_checkpoint(store.folder(step))
        except DamagedError as error:
            raise UserError(
                f"{error}, on this machine; all nodes need one shared folder."
            ) from error


def dataset_digests(training: TokenSequences, held_out: TokenSequences | None) -> dict[str, str]:
    """Return a digest of each dataset by the configuration key that names it."""
    return {
        "data.source": training.digest,
        "eval.source": held_out.digest if held_out else "",
    }


def check_step_count(checkpoint: Checkpoint | None, total_steps: int) -> None:
    """Check that `checkpoint`, if there is one, has at most `total_steps` steps.

    Raises:
        UserError: It has more.
    """
    if checkpoint and checkpoint.step > total_steps:
        raise UserError(
            f"{checkpoint.folder}: has {count(checkpoint.step, 'step')}, but train.max_steps or "
            f"epochs ask for {total_steps}; ask for more, or choose another run.name."
        )


def check_resumable(
    checkpoint: Checkpoint | None, digests: Mapping[str, str], total_steps: int
) -> None:
    """Check that training can resume from `checkpoint` with this data and this number of steps.

    Args:
        checkpoint: The checkpoint; None is always fine.
        digests: The digests of the run's datasets, from `dataset_digests`.
        total_steps: Number of steps of the run.

    Raises:
        UserError: The checkpoint was trained on other text, or has more steps than this run.
    """
    if checkpoint is None:
        return
    for key, digest in digests.items():
        if checkpoint.state["texts"][key] != digest:
            raise UserError(
                f"{checkpoint.folder}: was trained with other text than {key} gives now: a file, "
                "or the Python that provides it, has changed. Choose another run.name, or "
                "run.resume=never."
            )
    check_step_count(checkpoint, total_steps)
