"""Say on all ranks why one of them has failed.

A rank that fails by itself, as in a training step, leaves the others in a collective. They only see
a lost connection, and the message of PyTorch blames the network. So a rank that fails writes its
error to the process group's store, and the others read it there. Where ranks communicate anyway,
`Communicator.raise_on_all_ranks` shares their errors.
"""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from hqqtrain.common.errors import RankLostError, UserError
from hqqtrain.compat import default_store
from hqqtrain.distributed.comm import Communicator, deserialize_error, serialize_error

WAIT_SECONDS = 3.0
"""Seconds to wait for the error of another rank, which was written before the connection ended."""

_LOST_CONNECTION = re.compile(r"gloo|NCCL|connection (?:closed|reset|refused)|broken pipe", re.I)


@contextmanager
def share_failure(comm: Communicator) -> Iterator[None]:
    """Share an error that ends the body with the other ranks. Collective.

    Raises:
        UserError: Another rank has raised it and has left this one in a collective.
        RankLostError: Likewise for any other error, or for a rank that has vanished.
    """
    if comm.size == 1:
        yield
        return
    default: Any = default_store()
    store = dist.PrefixStore(comm.new_store_key("failure"), default.clone())
    store.set_timeout(timedelta(seconds=WAIT_SECONDS))
    try:
        yield
    except RankLostError:
        raise  # it came from another rank
    except Exception as error:
        if isinstance(error, RuntimeError) and _LOST_CONNECTION.search(str(error)):
            raise _error_of_another_rank(store, comm) from error
        _write(store, comm, error)
        raise


def _write(store: dist.Store, comm: Communicator, error: Exception) -> None:
    """Write the error of this rank to the store; the store may be gone together with its host."""
    try:
        store.set(str(comm.rank), serialize_error(error))
        # Rank 0 prints a UserError for all. With NCCL it may wait for this rank without end.
        if comm.device.type == "cuda" and comm.rank and isinstance(error, UserError):
            error.is_of_one_rank = not _exists_within(store, 0, WAIT_SECONDS)
    except RuntimeError:
        return


def _error_of_another_rank(store: dist.Store, comm: Communicator) -> Exception:
    """Return the error of the lowest rank that has written one."""
    deadline = time.monotonic() + WAIT_SECONDS
    try:
        while time.monotonic() < deadline:
            written = [rank for rank in range(comm.size) if store.check([str(rank)])]
            if written:
                return deserialize_error(written[0], store.get(str(written[0])).decode())
            time.sleep(0.1)
    except RuntimeError:  # the store is gone, too
        pass
    return RankLostError(
        "the connection to another rank was lost: it has ended, or its machine is gone. If it has "
        "failed, its own output says why."
    )


def _exists_within(store: dist.Store, rank: int, seconds: float) -> bool:
    """Whether `rank` writes an error within some seconds."""
    deadline = time.monotonic() + seconds
    while not store.check([str(rank)]):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
