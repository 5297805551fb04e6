"""The processes of one run: rank, world size and small collectives."""

import errno
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
    _store_key_numbers: Iterator[int] = field(
        default_factory=itertools.count, init=False, repr=False, compare=False
    )

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce_sum(self, values: Sequence[float] | torch.Tensor) -> list[float]:
        """Return the element-wise sum over all ranks, in float64. Collective.

        Values on the device are not copied to the host before they are summed.
        """
        if not isinstance(values, torch.Tensor):
            values = self.to_device(values)
        return self.sum_on_device(values).tolist()

    def sum_on_device(self, values: torch.Tensor) -> torch.Tensor:
        """Return the element-wise sum over all ranks, float64, on the device. Collective.

        The host does not wait for the device, if `values` are there.
        """
        total = values.to(self.device, torch.float64, copy=True)
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def to_device(self, values: Sequence[float]) -> torch.Tensor:
        """Return `values` in float64 on the device. The host does not wait for the copy."""
        pinned = torch.tensor(values, dtype=torch.float64, pin_memory=self.device.type == "cuda")
        return pinned.to(self.device, non_blocking=True)

    def all_gather_object(self, value: Any) -> list[Any]:
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
            UserError: A rank has raised it. A rank with an error of its own raises that one; all
                others raise the error of the lowest rank that has one.
            PreemptedError: Likewise.
            RankLostError: On the ranks without an error, if the error of that rank is any other
                exception.
        """
        own_error: Exception | None = None
        try:
            yield
        except Exception as error:
            own_error = error
        texts = self.all_gather_object(serialize_error(own_error))
        if own_error:
            raise own_error
        for rank, text in enumerate(texts):
            if text:
                raise deserialize_error(rank, text)

    def run_on_rank0(self, work: Callable[[], T]) -> T:
        """Call `work` on rank 0 only and return its result on every rank. Collective.

        The result must be a small Python object. Rank 0 broadcasts it, or the error that `work`
        has raised.

        Raises:
            UserError: `work` has raised it; the message is the same on all ranks.
            PreemptedError: Likewise.
            RankLostError: On the other ranks, if `work` has raised any other exception.
        """
        if self.size == 1:
            return work()
        own_error: Exception | None = None
        answer: list[Any] = [None, ""]  # the result and the serialized error
        if self.is_main:
            try:
                answer[0] = work()
            except Exception as error:
                own_error, answer[1] = error, serialize_error(error)
        dist.broadcast_object_list(answer, src=0, device=self.device)
        if own_error:
            raise own_error
        if answer[1]:
            raise deserialize_error(0, answer[1])
        return answer[0]

    def new_store_key(self, name: str) -> str:
        """Return a key of the process group's store that no earlier call has returned.

        It is the same on all ranks if all of them ask for their keys in the same order.

        Args:
            name: The purpose of the key, which becomes a part of it.
        """
        return f"hqqtrain {name} {next(self._store_key_numbers)}"

    def shutdown(self) -> None:
        """Destroy the process group after all ranks have arrived. Collective.

        Without this barrier, a rank that exits first can abort one that is still connected.
        """
        self.barrier()
        if dist.is_initialized():
            dist.destroy_process_group()

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


SINGLE_PROCESS = Communicator(0, 1, torch.device("cpu"))
"""For work that one process does by itself, however many ranks the run has."""

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Values of `errno` if a disk or a quota is full."""

_SHARED_ERRORS: dict[str, type[Exception]] = {
    error.__name__: error
    for error in (UserError, PreemptedError, MemoryError, torch.OutOfMemoryError)
}
"""Errors that concern all ranks alike, so that every rank raises them unchanged.

So does a full disk, an OSError.
"""


def serialize_error(error: BaseException | None) -> str:
    """Serialize `error` for the other ranks; empty if None.

    A subclass of a shared error is sent as that error, so that its meaning is not lost.
    """
    if error is None:
        return ""
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        return f"OSError: {error.errno} {error.strerror}: {error.filename}"
    shared = (name for name, cls in _SHARED_ERRORS.items() if isinstance(error, cls))
    return f"{next(shared, type(error).__name__)}: {error}"


def deserialize_error(rank: int, text: str) -> Exception:
    """Return the error to raise on this rank for `text`, which `serialize_error` made on `rank`."""
    class_name, _, message = text.partition(": ")
    number, _, description = message.partition(" ")
    if class_name == "OSError" and number in map(str, FULL_DISK):
        return OSError(int(number), f"{description}, on rank {rank}")
    if class_name in _SHARED_ERRORS:
        return _SHARED_ERRORS[class_name](message)
    return RankLostError(f"rank {rank} failed: {text}")
