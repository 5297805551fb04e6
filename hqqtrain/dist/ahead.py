"""Reading ahead: the next weight is on its way from the disk while this one is quantized."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

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


class ReadAhead:
    """Reads `pieces` in their order, on a thread of its own; `seconds`: what reading took.

    What a read raises is raised where its piece is asked for. `on_read` is called after every
    read, on that thread. As a context it ends the thread.
    """

    def __init__(
        self, reader: Reader, pieces: Iterable[Piece], on_read: Callable[[], object] = lambda: None
    ) -> None:
        self.seconds, self._on_read = 0.0, on_read
        self._reader, self._pieces = reader, iter(pieces)
        self._pool = ThreadPoolExecutor(1, "reading") if reader.ahead else None
        self._waiting: deque[Future[Tensor]] = deque()

    def __enter__(self) -> "ReadAhead":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        """The next piece, in the reader's own memory: on a GPU if it was made there."""
        if self._pool is None:
            return self._read(next(self._pieces))
        while len(self._waiting) <= self._reader.ahead:
            piece = next(self._pieces, None)
            if piece is None:
                break
            self._waiting.append(self._pool.submit(self._read, piece))
        if not self._waiting:
            raise StopIteration
        return self._waiting.popleft().result()

    def _read(self, piece: Piece) -> Tensor:
        began = time.perf_counter()
        tensor = self._reader.read(*piece)
        self.seconds += time.perf_counter() - began
        self._on_read()
        return tensor
