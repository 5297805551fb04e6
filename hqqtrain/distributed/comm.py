"""The processes of one run: rank, world size and small collectives."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

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
    _numbers: Iterator[int] = field(
        default_factory=itertools.count, init=False, repr=False, compare=False
    )

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Sequence[float] | torch.Tensor) -> list[float]:
        """Return the element-wise sum over all ranks, in float64. Collective.

        Values on the device are not copied to the host before they are summed.
        """
        total = torch.as_tensor(values, dtype=torch.float64, device=self.device).clone()
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

        The result must be a small Python object. One broadcast carries it, or the error; the other
        ranks have nothing to report.

        Raises:
            UserError: `work` has raised it; the message is the same on all ranks.
            PreemptedError: Likewise.
            RankLostError: On the other ranks, if `work` has raised any other exception.
        """
        if self.size == 1:
            return work()
        own: Exception | None = None
        answer: list[Any] = [None, ""]  # the result and the error
        if self.is_main:
            try:
                answer[0] = work()
            except Exception as error:
                own, answer[1] = error, serialize_error(error)
        dist.broadcast_object_list(answer, src=0, device=self.device)
        if own:
            raise own
        if answer[1]:
            raise deserialize_error(0, answer[1])
        return answer[0]

    def unique_key(self, name: str) -> str:
        """Return a key that starts with `name` and is the same on all ranks.

        All ranks must ask for keys in the same order.
        """
        return f"hqqtrain {name} {next(self._numbers)}"

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
