"""Encode chats and completions in several processes, as if one had done it.

Most of the time of a chat goes into its template, which runs in Python. The order of the examples
and the first error are those of a single process. The examples may be without end: only a few
batches for each process are read ahead.
"""

import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_any
from typing import TYPE_CHECKING, Any

from hqqtrain.common.errors import UserError
from hqqtrain.common.kept_log import Line, kept_log
from hqqtrain.common.signals import SIGNALS
from hqqtrain.data.chat.encoding import Encoded
from hqqtrain.data.examples import text_of
from hqqtrain.data.tokenization import watch

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

    from hqqtrain.data.encoding import ExampleEncoder

logger = logging.getLogger(__name__)

Numbered = tuple[int, Any]
"""An example, and its number from 1."""

EncodedOrRefused = Encoded | UserError
"""The tokens of an example, or why it is refused."""

Batch = tuple[list[EncodedOrRefused], list[Line]]
"""The tokens of some examples, and what was logged meanwhile."""

SERIAL_CHARACTERS = 1 << 23
"""Characters that one process encodes before others are started, which takes them some seconds."""

BATCH_CHARACTERS, BATCH_EXAMPLES = 1 << 18, 256
"""Largest part of the examples that a process gets at a time, unless a single one is longer."""

_POLL_SECONDS = 0.2


def encode_in_order(
    encoder: "ExampleEncoder",
    examples: Iterator[Numbered],
    workers: int,
    on_batch: Callable[[], object],
) -> Iterator[EncodedOrRefused]:
    """Yield the tokens of every example, or why it is refused, in order.

    Args:
        encoder: The encoder of the examples.
        examples: The examples with their numbers.
        workers: Number of processes, if there are many examples.
        on_batch: Called now and then; it may raise to stop.

    Raises:
        UserError: The tokenizer fails, or a process was killed.
    """
    characters = 0
    with kept_log() if workers > 1 else nullcontext(list[Line]()) as lines:
        for number, example in examples:
            if number % 64 == 1:
                on_batch()
            yield _encode(encoder, (number, example))
            characters += len(text_of(example)) if workers > 1 else 0
            if characters > SERIAL_CHARACTERS:
                break
        else:
            return
    for encoded, logged in _encode_in_processes(encoder, examples, workers, on_batch):
        # A line that every process would log once appears once.
        for level, message in dict.fromkeys(logged):
            if (level, message) not in lines:
                logger.log(level, "%s", message)
                lines.append((level, message))
        yield from encoded


def _encode(encoder: "ExampleEncoder", numbered: Numbered) -> EncodedOrRefused:
    number, example = numbered
    call = partial(encoder.encode, example, number)
    return watch(call, len(text_of(example)), encoder.where)


def _encode_in_processes(
    encoder: "ExampleEncoder",
    examples: Iterator[Numbered],
    workers: int,
    on_batch: Callable[[], object],
) -> Iterator[Batch]:
    """Yield the tokens of examples in batches; see `encode_in_order`."""
    reader = _Reader(examples)
    pending: deque[Future[Batch]] = deque()
    # Threads of this process may hold locks, which a forked process could never take.
    context = start_method()
    # The start of a process takes until it has read arguments that do not fit into a pipe, as the
    # encoder. From a queue all processes read theirs at the same time.
    encoders = context.Queue()
    encoders.cancel_join_thread()
    for _ in range(workers):
        encoders.put(encoder)
    end, ending = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (encoders, end))
    try:
        while True:
            while len(pending) < 2 * workers and (batch := reader.next_batch()):
                pending.append(pool.submit(_encode_batch, batch))
            if not pending:
                break
            yield _result(pending.popleft(), on_batch)
    except BrokenProcessPool as error:
        on_batch()  # Ctrl-C reaches a process that is just starting, too
        raise UserError(
            f"data.workers={workers}: a process that encodes {encoder.where} was killed, maybe "
            "for lack of memory; set a smaller number, such as 1."
        ) from error
    finally:
        # If one was killed, the pool waits for the others, which ignore the signal that it sends
        # them, and may wait for a lock that nobody releases.
        ending.send_bytes(b"end")
        pool.shutdown(wait=True, cancel_futures=True)
        for item in (encoders, end, ending):
            item.close()
    if reader.error:
        raise reader.error


class _Reader:
    """Reads batches of examples.

    An error of reading is kept, because examples that were read before may have errors, too.
    """

    def __init__(self, examples: Iterator[Numbered]) -> None:
        self._examples = examples
        self.error: Exception | None = None

    def next_batch(self) -> list[Numbered]:
        """Return the next examples; none at the end, or after an error."""
        batch: list[Numbered] = []
        characters = 0
        try:
            while not self.error and characters < BATCH_CHARACTERS and len(batch) < BATCH_EXAMPLES:
                batch.append(next(self._examples))
                characters += len(text_of(batch[-1][1]))
        except StopIteration:
            pass
        except Exception as error:
            self.error = error
        return batch


def start_method() -> Any:
    """Return the context of multiprocessing that starts the processes."""
    return multiprocessing.get_context("spawn")


def _result(future: Future[Batch], on_batch: Callable[[], object]) -> Batch:
    """Wait for a batch. Signals stop the wait through `on_batch`."""
    while True:
        on_batch()
        if wait([future], _POLL_SECONDS).done:
            return future.result()


_encoders: list["ExampleEncoder"] = []
"""The encoder of a worker."""


def _start_worker(encoders: "Queue[ExampleEncoder]", end: Connection) -> None:
    """Prepare a worker. It ends with its parent, which alone acts on signals, or once `end` has
    bytes, which nobody reads."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    own = logging.getLogger("hqqtrain")
    own.propagate = False  # the parent logs for it
    own.setLevel(logging.INFO)
    threading.Thread(target=_wait_for_end, args=(end,), daemon=True).start()
    _encoders[:] = [encoders.get()]


def _wait_for_end(end: Connection) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for_any([end, parent.sentinel])
    os._exit(1)


def _encode_batch(batch: list[Numbered]) -> Batch:
    with kept_log() as lines:
        return [_encode(_encoders[0], numbered) for numbered in batch], lines
