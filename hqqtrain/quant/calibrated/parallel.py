"""Work in parts that give the same bits on any number of threads.

A product of matrices sums in an order that depends on how many threads share it. So every part
runs on one thread, and the threads of a CPU share the parts. A GPU has one queue of work and needs
no threads.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def map_in_order(call: Callable[[T], R], parts: Iterable[T], device: torch.device) -> list[R]:
    """Return the results of `call` for all parts, in their order."""
    return list(iterate_in_order(call, parts, device))


def iterate_in_order(
    call: Callable[[T], R], parts: Iterable[T], device: torch.device
) -> Iterator[R]:
    """Yield the results of `call` for all parts, in their order.

    On a CPU as many parts are worked on, or wait for the caller, as PyTorch may use threads.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield from map(call, parts)
        return
    with one_thread(), ThreadPoolExecutor(threads, initializer=_use_one_thread) as pool:
        pending: deque[Future[R]] = deque()
        for part in parts:
            pending.append(pool.submit(call, part))
            if len(pending) == threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _use_one_thread() -> None:
    torch.set_num_threads(1)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch use one thread for the work of this one, and then as many as before."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)
