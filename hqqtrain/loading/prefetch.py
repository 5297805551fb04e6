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
    """Rows of one checkpoint tensor to read: slices of dimension 0 that are concatenated in order.

    `rows` is None for the full tensor.
    """

    name: str
    rows: list[slice] | None


_Prefetched = tuple[Tensor, torch.cuda.Event | None]
"""A tensor on the device, and for a copy to a GPU the event that marks its end."""


class Prefetcher:
    """Iterator that reads `row_ranges` in order on a background thread.

    An error of a read is raised when its rows are requested. Use the iterator as a context manager:
    leaving the context ends the thread.

    Args:
        reader: Source of the rows.
        row_ranges: The rows to read.
        device: Device of the returned tensors. A GPU receives them on a separate stream.
        on_read: Called after every read, on the background thread.

    Attributes:
        seconds: Time spent in reads.
    """

    def __init__(
        self, reader: WeightSource, row_ranges: Iterable[RowRange], device: torch.device,
        on_read: Callable[[], object] = lambda: None,
    ) -> None:  # fmt: skip
        self.seconds, self._on_read = 0.0, on_read
        self._reader, self._row_ranges, self._device = reader, iter(row_ranges), device
        self._pool = ThreadPoolExecutor(1, "reading") if reader.prefetch_depth else None
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
        """Return the rows of the next range as a tensor on the device."""
        if self._pool is None:
            return self._wait_for_copy(self._read(next(self._row_ranges)))
        # Keep the requested read and `prefetch_depth` more in flight; the thread runs them in
        # order.
        while len(self._pending) <= self._reader.prefetch_depth:
            row_range = next(self._row_ranges, None)
            if row_range is None:
                break
            self._pending.append(self._pool.submit(self._read, row_range))
        if not self._pending:
            raise StopIteration
        return self._wait_for_copy(self._pending.popleft().result())

    def _read(self, row_range: RowRange) -> _Prefetched:
        start = time.perf_counter()
        tensor = self._reader.read(*row_range)
        self.seconds += time.perf_counter() - start
        self._on_read()
        if self._copy_stream is None or tensor.device.type == "cuda":
            return tensor, None
        with torch.cuda.stream(self._copy_stream):
            return tensor.to(self._device, non_blocking=True), self._copy_stream.record_event()

    def _wait_for_copy(self, prefetched: _Prefetched) -> Tensor:
        """Make the current stream wait for this copy only, not for the copies queued after it."""
        tensor, copy_end = prefetched
        if copy_end is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(copy_end)
            # The memory belongs to the copy stream, which must not reuse it before the current
            # stream is done with the tensor.
            tensor.record_stream(stream)
        return tensor
