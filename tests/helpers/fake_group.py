"""Pretend to be one rank of many, in a process group that communicates nothing."""

from collections.abc import Iterator
from contextlib import contextmanager

from ranks import CPU
from torch.distributed import destroy_process_group, init_process_group
from torch.testing._internal.distributed.fake_pg import FakeStore

from hqqtrain.distributed.comm import Communicator


@contextmanager
def fake_rank(rank: int, size: int) -> Iterator[Communicator]:
    """Make this process rank `rank` of `size`, for code that depends on these two numbers only."""
    init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    yield Communicator(rank, size, CPU)
    destroy_process_group()
