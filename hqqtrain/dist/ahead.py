"""Reading ahead: the next weight is on its way from the disk, and to the GPU, while this one is
quantized."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Piece(NamedTuple):
    """Rows of a tensor of the checkpoint, one slice after the other; None: all of it."""

    name: str
    rows: list[slice] | None


class Reader(Protocol):
    """What is needed of a checkpoint: rows of tensors, by name. `ahead`: how many reads may be
    under way before they are asked for; each has its memory."""

    bytes_read: int
    ahead: int

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, rows: list[slice] | None = None) -> Tensor: ...


_Copy = tuple[Tensor, torch.cuda.Event | None]
"""A piece on the device, and on a GPU what tells the end of its copy."""


class ReadAhead:
    """Reads `pieces` in their order, on a thread of its own; `seconds`: what reading took.

    What a read raises is raised where its piece is asked for. `on_read` is called after every
    read, on that thread. As a context it ends the thread.

    Args:
        device: where pieces are wanted. A GPU copies them on a stream of its own.
    """

    def __init__(
        self, reader: Reader, pieces: Iterable[Piece], device: torch.device,
        on_read: Callable[[], object] = lambda: None,
    ) -> None:  # fmt: skip
        self.seconds, self._on_read = 0.0, on_read
        self._reader, self._pieces, self._device = reader, iter(pieces), device
        self._pool = ThreadPoolExecutor(1, "reading") if reader.ahead else None
        self._waiting: deque[Future[_Copy]] = deque()
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __enter__(self) -> "ReadAhead":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        """The next piece, on the device."""
        if self._pool is None:
            return self._arrived(self._read(next(self._pieces)))
        while len(self._waiting) <= self._reader.ahead:
            piece = next(self._pieces, None)
            if piece is None:
                break
            self._waiting.append(self._pool.submit(self._read, piece))
        if not self._waiting:
            raise StopIteration
        return self._arrived(self._waiting.popleft().result())

    def _read(self, piece: Piece) -> _Copy:
        began = time.perf_counter()
        tensor = self._reader.read(*piece)
        self.seconds += time.perf_counter() - began
        self._on_read()
        if self._copies is None or tensor.device.type == "cuda":
            return tensor, None
        with torch.cuda.stream(self._copies):
            return tensor.to(self._device, non_blocking=True), self._copies.record_event()

    def _arrived(self, copy: _Copy) -> Tensor:
        """The copy's own end is waited for, not that of copies behind it."""
        tensor, end = copy
        if end is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(end)
            tensor.record_stream(stream)
        return tensor
