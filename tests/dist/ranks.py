"""Runs a function on real processes that talk over gloo."""

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import torch
from e2e.runs import free_port

from hqqtrain.config import RankLostError, UserError
from hqqtrain.dist import DivergedError, Processes

CPU = torch.device("cpu")


def _found(
    rank: int, size: int, port: int, answers: Any, case: Callable[..., None], *arguments: Any
) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
    try:
        case(rank, Processes(rank, size, CPU), *arguments)
        answers.put((rank, ""))
    except (DivergedError, RankLostError, UserError) as error:
        answers.put((rank, str(error)))
    except Exception as error:
        answers.put((rank, f"{type(error).__name__}: {error}"))
    torch.distributed.destroy_process_group()


def on_ranks(
    case: Callable[..., None], size: int, *arguments: Any, lost: int | None = None
) -> list[str]:
    """The fault that `case` raised on every rank, or nothing; but for `lost`, which is killed."""
    context, port = multiprocessing.get_context("forkserver"), free_port()
    context.set_forkserver_preload(["torch.distributed.fsdp", "hqqtrain.tasks.prepare"])
    answers = context.Queue()
    workers = [
        context.Process(
            target=_found, args=(rank, size, port, answers, case, *arguments), daemon=True
        )
        for rank in range(size)
    ]
    for worker in workers:
        worker.start()
    ranks = [rank for rank in range(size) if rank != lost]
    found = dict(answers.get(timeout=120) for _ in ranks)
    for rank in ranks:
        workers[rank].join(30)
    if lost is not None:
        workers[lost].kill()
    return [found[rank] for rank in ranks]
