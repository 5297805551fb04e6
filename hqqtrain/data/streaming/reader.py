"""Read blocks of sequences on a thread, while the device trains on the block before.

One block is trained on, one is ready, and one is being read: memory is bounded by three.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator

from hqqtrain.common.errors import UserError
from hqqtrain.data.streaming.blocks import Block

_POLL_SECONDS = 0.05


class _StoppedError(Exception):
    """The reader is closed."""


class BlockReader:
    """Reads blocks ahead.

    Args:
        read: Returns the blocks, which only the thread iterates; gets a function that it must call
            now and then, and that raises to stop.
        where: `key=source`, for messages.
    """

    def __init__(self, read: Callable[[Callable[[], None]], Iterator[Block]], where: str) -> None:
        self._read, self._where = read, where
        self._queue: queue.Queue[Block | BaseException] = queue.Queue(1)
        self._stop = threading.Event()
        # A daemon, because the interpreter would wait for any other thread at its end.
        self._thread = threading.Thread(target=self._run, name="data", daemon=True)
        self._thread.start()

    def next(
        self, check: Callable[[], object] = lambda: None, *, max_seconds: float | None
    ) -> Block:
        """Wait for the next block and return it.

        Args:
            check: Called while waiting; it may raise.
            max_seconds: Longest wait; None: without end.

        Raises:
            UserError: The data cannot be read, or no block comes in time.
        """
        deadline = float("inf") if max_seconds is None else time.monotonic() + max_seconds
        while True:
            try:
                block = self._queue.get(timeout=_POLL_SECONDS)
                break
            except queue.Empty:
                check()
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{self._where}: no data has come for {max_seconds:.0f} seconds; check the "
                        "disk or the network. The same command resumes the run."
                    ) from None
        if isinstance(block, BaseException):
            self._put(block)  # for the next call
            raise block
        return block

    def close(self) -> None:
        """Stop the thread, which ends after the texts that it is tokenizing."""
        self._stop.set()
        self._thread.join(5)

    def _run(self) -> None:
        try:
            for block in self._read(self._raise_if_stopped):
                self._put(block)
                self._raise_if_stopped()
        except BaseException as error:  # also a panic of the tokenizer, which is in Rust
            self._put(error)

    def _raise_if_stopped(self) -> None:
        if self._stop.is_set():
            raise _StoppedError

    def _put(self, item: Block | BaseException) -> None:
        """Wait until there is room for a block, or until the reader is closed."""
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=_POLL_SECONDS)
                return
            except queue.Full:
                continue
