"""The processes of one run: rank, world size and small collectives.

The rank comes from the environment, whatever the launcher is: torchrun and `accelerate launch` both
set RANK and WORLD_SIZE. One case needs a workaround. On a machine without a GPU, `accelerate launch
--num_processes 2` silently starts a single process (accelerate 1.15, `simple_launcher`);
`relaunch_if_ranks_were_lost` then starts all of them.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist

from hqqtrain.common.errors import PreemptedError, RankLostError, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Communicator:
    """Rank, world size and device of this process, and collectives over all ranks.

    The collectives also work for a single process without a process group.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the element-wise sum over all ranks, in float64. Collective."""
        total = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Return `value` of every rank, in rank order; for small Python objects. Collective."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(
        self, tensor: torch.Tensor, owner: int, group: dist.ProcessGroup | None = None
    ) -> None:
        """Overwrite `tensor` with that of rank `owner` of `group`. Collective over the group.

        Without `group`, all ranks take part.
        """
        if self.size > 1:
            dist.broadcast(tensor, group=group, group_src=owner)

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """Raise an error of one rank on every rank, at the end of the context. Collective.

        Without it, the other ranks would wait for the failed one in their next collective. The
        body must not use collectives itself.

        Raises:
            UserError: A rank has raised it; the message is the same on all ranks.
            PreemptedError: Likewise.
            RankLostError: Another rank has raised any other exception.
        """
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        for rank, text in enumerate(self.gather(serialize_error(own))):
            if own:
                raise own
            if text:
                raise deserialize_error(rank, text)

    def run_on_rank0(self, work: Callable[[], T]) -> T:
        """Call `work` on rank 0 only and return its result on every rank. Collective.

        The result must be a small Python object. Errors are raised on every rank, see `raise_on_all_ranks`.
        """
        with self.raise_on_all_ranks():
            result = work() if self.is_main else None
        return self.gather(result)[0]

    def leave(self) -> None:
        """Destroy the process group after all ranks have arrived. Collective.

        Without it, a rank that exits first can abort one that is still connected.
        """
        self.barrier()
        if dist.is_initialized():
            dist.destroy_process_group()

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


SINGLE_PROCESS = Communicator(0, 1, torch.device("cpu"))
"""For work that one process does by itself, however many ranks the run has."""

_SHARED = {kind.__name__: kind for kind in (UserError, PreemptedError)}
"""Errors that concern all ranks alike, so that every rank raises them unchanged."""


def serialize_error(error: BaseException | None) -> str:
    """Serialize `error` for the other ranks; empty if None."""
    return f"{type(error).__name__}: {error}" if error else ""


def deserialize_error(rank: int, text: str) -> UserError | PreemptedError | RankLostError:
    """Return the error to raise on this rank for `text`, which `serialize_error` made on `rank`."""
    kind, _, message = text.partition(": ")
    if kind in _SHARED:
        return _SHARED[kind](message)
    return RankLostError(f"rank {rank} failed: {text}")


def relaunch_if_ranks_were_lost(arguments: Sequence[str]) -> None:
    """Replace this process by torchrun if `accelerate launch` has dropped the other ranks.

    If more than one process was requested, its single-process launcher leaves MASTER_PORT without
    RANK in the environment. Only the parent's command line has the number of processes.

    Args:
        arguments: Command line of `python -m hqqtrain`.

    Raises:
        UserError: The number of processes cannot be determined.
    """
    lost = {"MASTER_PORT", "ACCELERATE_MIXED_PRECISION"} <= os.environ.keys()
    if not lost or "RANK" in os.environ:
        return
    count = _requested_processes()
    if count is None:
        raise UserError(
            "accelerate launch starts only one process on a machine without GPUs, though more "
            "were requested. Use `NPROC=2 ./launch.sh ...` or `torchrun --nproc-per-node 2 -m "
            "hqqtrain ...`."
        )
    master = [
        "--master_addr",
        os.environ["MASTER_ADDR"],
        "--master_port",
        os.environ["MASTER_PORT"],
    ]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count)]
    os.execv(sys.executable, [*launcher, *master, "-m", "hqqtrain", *arguments])


def _requested_processes() -> int | None:
    """Return --num_processes of the parent's command line, None if it cannot be read."""
    try:
        parent = psutil.Process().parent()
        words = parent.cmdline() if parent else []
    except psutil.Error:
        return None
    for word, following in zip(words, [*words[1:], ""], strict=True):
        flag, _, value = word.replace("-", "_").partition("=")
        if flag in ("__num_processes", "_n") and (value or following).isdigit():
            return int(value or following)
    return None
