"""Run a function on several real processes that communicate over gloo."""

import os
from collections.abc import Callable
from typing import Any

import torch
from forkserver import fork_context
from runs import free_port

from hqqtrain.common.errors import RankLostError, UserError
from hqqtrain.distributed.comm import Communicator
from hqqtrain.distributed.consistency import ReplicaMismatchError

CPU = torch.device("cpu")


def _run(
    rank: int, size: int, port: int, messages: Any, case: Callable[..., None], *arguments: Any
) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
        torch.distributed.barrier()  # a rank that ended at once would leave others half connected
        case(rank, Communicator(rank, size, CPU), *arguments)
        messages.put((rank, ""))
    except (ReplicaMismatchError, RankLostError, UserError) as error:
        messages.put((rank, str(error)))
    except Exception as error:
        messages.put((rank, f"{type(error).__name__}: {error}"))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def on_ranks(
    case: Callable[..., None], size: int, *arguments: Any, lost: int | None = None
) -> list[str]:
    """Run `case(rank, comm, *arguments)` on `size` ranks and return the error message of each.

    The message of a rank without an error is empty. Rank `lost` sends no message and is killed at
    the end; it is not in the result.
    """
    context, port = fork_context(), free_port()
    messages = context.Queue()
    workers = [
        context.Process(
            target=_run, args=(rank, size, port, messages, case, *arguments), daemon=True
        )
        for rank in range(size)
    ]
    for worker in workers:
        worker.start()
    ranks = [rank for rank in range(size) if rank != lost]
    message_of_rank = dict(messages.get(timeout=120) for _ in ranks)
    for rank in ranks:
        workers[rank].join(30)
    if lost is not None:
        workers[lost].kill()
    return [message_of_rank[rank] for rank in ranks]
