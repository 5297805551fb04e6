"""Prefetch of checkpoint tensors, so that the disk, the bus and the GPU work at the same time.

While one weight is quantized, the next one is read from disk and copied to the GPU.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from hqqtrain.models.weights.base import WeightSource


class RowRange(NamedTuple):
    """Row ranges of one checkpoint tensor, concatenated in order when read.

    `rows` is None for the whole tensor.
    """

    name: str
    rows: list[slice] | None


_Prefetched = tuple[Tensor, torch.cuda.Event | None]
"""A tensor on the device, and on a GPU the event that marks the end of its copy."""


class Prefetcher:
    """Iterator that reads `pieces` in order on a background thread.

    An error of a read is raised when its piece is requested. Use the iterator as a context
    manager: leaving the context ends the thread. `seconds` is the time spent in reads.

    Args:
        reader: Source of the rows.
        pieces: Row ranges to read.
        device: Device the tensors are returned on. A GPU receives them on a separate stream.
        on_read: Called after every read, on the background thread.
    """

    def __init__(
        self, reader: WeightSource, pieces: Iterable[RowRange], device: torch.device,
        on_read: Callable[[], object] = lambda: None,
    ) -> None:  # fmt: skip
        self.seconds, self._on_read = 0.0, on_read
        self._reader, self._pieces, self._device = reader, iter(pieces), device
        self._pool = ThreadPoolExecutor(1, "reading") if reader.ahead else None
        self._pending: deque[Future[_Prefetched]] = deque()
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        """Return the next piece as a tensor on the device."""
        if self._pool is None:
            return self._wait(self._read(next(self._pieces)))
        # Keep the requested read and `ahead` more in flight; one thread runs them in order.
        while len(self._pending) <= self._reader.ahead:
            piece = next(self._pieces, None)
            if piece is None:
                break
            self._pending.append(self._pool.submit(self._read, piece))
        if not self._pending:
            raise StopIteration
        return self._wait(self._pending.popleft().result())

    def _read(self, piece: RowRange) -> _Prefetched:
        start = time.perf_counter()
        tensor = self._reader.read(*piece)
        self.seconds += time.perf_counter() - start
        self._on_read()
        if self._copy_stream is None or tensor.device.type == "cuda":
            return tensor, None
        with torch.cuda.stream(self._copy_stream):
            return tensor.to(self._device, non_blocking=True), self._copy_stream.record_event()

    def _wait(self, copy: _Prefetched) -> Tensor:
        """Make the current stream wait for this copy only, not for the copies queued after it."""
        tensor, end = copy
        if end is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(end)
            # The copy stream owns the memory: it must not reuse it before this stream is done.
            tensor.record_stream(stream)
        return tensor
