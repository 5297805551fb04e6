"""The processes of one run: rank and world size, sums and gathers over them.

Everything asks the environment for its rank, not for its launcher: torchrun and
`accelerate launch` both set RANK and WORLD_SIZE. One case needs help. On a machine without
a GPU, `accelerate launch --num_processes 2` starts a single process and says nothing
(accelerate 1.15, `simple_launcher`); `relaunch_if_ranks_were_lost` mends that.
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

from hqqtrain.config import PreemptedError, RankLostError, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """Rank, size and device of this process's world; collectives that work alone, too."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over all ranks, in float64. Collective."""
        total = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order. Collective; for small Python objects."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(
        self, tensor: torch.Tensor, owner: int, group: dist.ProcessGroup | None = None
    ) -> None:
        """Overwrites `tensor` with the bytes that rank `owner` of `group`, or of all, holds.
        Collective over them."""
        if self.size > 1:
            dist.broadcast(tensor, group=group, group_src=owner)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around work without collectives: what one rank raises is raised on every rank.

        A UserError or PreemptedError as it is, anything else on the others as RankLostError. Else
        they would wait for the one that left. Collective at its end.
        """
        fault: Exception | None = None
        try:
            yield
        except Exception as error:
            fault = error
        for rank, told in enumerate(self.gather(tell(fault))):
            if fault:
                raise fault
            if told:
                raise retold(rank, told)

    def on_main(self, work: Callable[[], T]) -> T:
        """What `work` returns on the first rank, which alone does it, on every rank.

        So is what it raises, see `together`. Collective; for small Python objects.
        """
        with self.together():
            found = work() if self.is_main else None
        return self.gather(found)[0]

    def leave(self) -> None:
        """Ends the process group, when all ranks are ready to. Collective.

        Without it a rank that exits first can abort one that is still connected.
        """
        self.barrier()
        if dist.is_initialized():
            dist.destroy_process_group()

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


ALONE = Processes(0, 1, torch.device("cpu"))
"""Of what one process does by itself, whatever its world."""


_SHARED = {kind.__name__: kind for kind in (UserError, PreemptedError)}
"""What is one rank's as much as another's."""


def tell(error: BaseException | None) -> str:
    """What the other ranks need to hear of `error`; nothing without one."""
    return f"{type(error).__name__}: {error}" if error else ""


def retold(rank: int, told: str) -> UserError | PreemptedError | RankLostError:
    """What to raise on this rank, when `rank` has told that."""
    kind, _, text = told.partition(": ")
    return _SHARED[kind](text) if kind in _SHARED else RankLostError(f"rank {rank} failed: {told}")


def relaunch_if_ranks_were_lost(arguments: Sequence[str]) -> None:
    """Replaces this process by torchrun where `accelerate launch` dropped the other ranks.

    Its single-process launcher leaves MASTER_PORT without RANK in the environment when more
    than one process was asked for; how many stands on the parent's command line only.

    Raises:
        UserError: the number of processes cannot be found out.
    """
    lost = {"MASTER_PORT", "ACCELERATE_MIXED_PRECISION"} <= os.environ.keys()
    if not lost or "RANK" in os.environ:
        return
    count = _processes_asked_for()
    if count is None:
        raise UserError(
            "accelerate launch starts only one process on a machine without GPUs, though more "
            "were asked for. Use `NPROC=2 ./launch.sh ...` or `torchrun --nproc-per-node 2 -m "
            "hqqtrain ...`."
        )
    where = ["--master_addr", os.environ["MASTER_ADDR"], "--master_port", os.environ["MASTER_PORT"]]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count)]
    os.execv(sys.executable, [*launcher, *where, "-m", "hqqtrain", *arguments])


def _processes_asked_for() -> int | None:
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
