"""Heartbeat between ranks that work for minutes without a collective.

If one rank fails or vanishes, the others would work until their next collective and wait there for
half an hour, the process group's time-out. Each rank therefore writes to the process group's store
that it is alive and how its work ended, and reads the state of the others. The store needs no
collective.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import repeat
from types import TracebackType
from typing import Any

import torch.distributed as dist

from hqqtrain.common.errors import RankLostError
from hqqtrain.compat import default_store
from hqqtrain.distributed.comm import Communicator, deserialize_error, serialize_error

HEARTBEAT_SECONDS = 0.5
"""Seconds between two heartbeats."""

LOST_AFTER_SECONDS = 20.0
"""Seconds without a heartbeat after which a rank counts as lost.

A thread sends the heartbeats. The long calls of torch and safetensors release the GIL, so they
delay the thread by seconds at most.
"""

_STORE_HOST = -1
"""Key of `Heartbeat._lost` for the process that hosts the store, which is not a rank."""


def _pauses(longest: float) -> Iterator[float]:
    """Yield the seconds between two looks at the other ranks, while this one waits for them.

    Ranks mostly end together, so the first pauses are milliseconds.
    """
    seconds = 0.001
    while True:
        yield min(seconds, longest)
        seconds *= 2


class Heartbeat:
    """Context around work that each rank does on its own; the body must call `check` often.

    All ranks enter and leave the context together. An error of one rank is raised on every rank.
    The others raise a UserError or PreemptedError unchanged, and a RankLostError for any other
    error or for a rank that is gone. Collective.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._others = [rank for rank in range(comm.size) if rank != comm.rank]
        self._end_state: dict[str, Any] = {}  # what this rank reports once its work has ended
        self._reported: dict[str, Any] = {}  # the last state that this rank has written
        self._states: dict[int, dict[str, Any]] = {}  # the last state read from each rank
        self._lost: dict[int, str] = {}  # rank -> message
        self._store: Any = None  # where the ranks exchange their states, from `__enter__` on
        self._last_read_time = time.monotonic()
        self._last_change_times: dict[int, float] = {}  # rank -> time of its newest state
        self._raised: Exception | None = None  # the error that `check` has raised
        # The thread is woken when this rank begins to wait, and tells that it has looked at others.
        self._wake, self._has_looked = threading.Event(), threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        if self._others:
            # A connection of its own, because the thread uses it while torch may use the first.
            default: Any = default_store()
            self._store = dist.PrefixStore(self._comm.new_store_key("heartbeat"), default.clone())
            self._store.set_timeout(timedelta(seconds=LOST_AFTER_SECONDS))
            # After the barrier the keys of all ranks exist, so `_read_states` never blocks on one.
            self._store.set(str(self._comm.rank), "{}")
            self._comm.barrier()
            self._last_read_time = time.monotonic()
            self._last_change_times = dict.fromkeys(self._others, self._last_read_time)
            self._thread.start()
        return self

    def check(self) -> None:
        """Raise the error of another rank, if any.

        Raises:
            UserError: Another rank has raised it.
            PreemptedError: Likewise.
            RankLostError: Another rank has raised any other error, or is gone.
        """
        self._raised = self._remote_error()
        if self._raised:
            raise self._raised

    def wait_for(self, rank: int, on_wait: Callable[[], object]) -> None:
        """Wait until another rank has left the context without an error.

        Args:
            rank: The rank.
            on_wait: Called again and again; it may raise to stop.

        Raises:
            UserError, PreemptedError, RankLostError: As for `check`.
        """
        self._wake.set()
        while rank != self._comm.rank and not self._has_ended(rank):
            on_wait()
            self.check()
            self._wait_for_look()
        self.check()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        if not self._others:
            return
        # Report only errors of this rank: one that `check` has raised is known to the others.
        own_error = None if error is self._raised else error
        self._end_state = {"ended": True, "fault": serialize_error(own_error)}
        self._wake.set()
        # On KeyboardInterrupt or SystemExit, leave at once.
        if error is None or isinstance(error, Exception):
            self._wait_for_others()
        self._stop.set()
        self._wake.set()
        self._thread.join(2 * HEARTBEAT_SECONDS)
        if error is None:
            # Another rank may have failed after this rank's last `check`.
            self.check()

    def _wait_for_others(self) -> None:
        """Wait until this rank may leave: until every rank has ended or is lost.

        Rank 0 hosts the store, so it stays until the others have read how every rank has ended,
        also if it has failed itself.
        """
        awaited = self._others if self._comm.rank == 0 else []
        while not (self._reported.get("has_read_ends") and all(map(self._has_left, awaited))):
            if self._is_cut_off():
                return
            self._wait_for_look()

    def _wait_for_look(self) -> None:
        """Wait until the thread has looked at the other ranks, but not for long: it may hang."""
        self._has_looked.wait(HEARTBEAT_SECONDS / 5)
        self._has_looked.clear()

    def _run(self) -> None:
        """Body of the thread: send heartbeats and read those of others until `_stop` is set."""
        beats = 0
        pauses: Iterator[float] = repeat(HEARTBEAT_SECONDS)
        try:
            while True:
                woken = self._wake.wait(next(pauses))
                if self._stop.is_set():
                    return
                if woken:
                    self._wake.clear()
                    longest = HEARTBEAT_SECONDS / (5 if self._end_state else 1)
                    pauses = _pauses(longest)
                # The other ranks see by the changed counter that this rank is alive.
                beats += 1
                state = {"beat": beats} | self._end_state
                self._store.set(str(self._comm.rank), json.dumps(state))
                self._reported = state
                self._read_states()
                have_ended = all(map(self._has_ended, self._others))
                if have_ended and self._end_state and not state.get("has_read_ends"):
                    self._end_state = self._end_state | {"has_read_ends": True}
                    self._wake.set()  # so that the others read it soon
                self._has_looked.set()
        except RuntimeError as error:
            # The store raises when its host is gone, or does not answer within LOST_AFTER_SECONDS.
            self._lost[_STORE_HOST] = f"the process that hosts the store is gone ({error})."

    def _read_states(self) -> None:
        """Read the states of the other ranks and note those that have not changed for too long."""
        texts = self._store.multi_get([str(rank) for rank in self._others])
        now = time.monotonic()
        # If this process itself was suspended, as by a debugger, it has missed the heartbeats of
        # the others: measure their silence from now on.
        if now - self._last_read_time > LOST_AFTER_SECONDS / 4:
            self._last_change_times = dict.fromkeys(self._others, now)
        self._last_read_time = now
        for rank, text in zip(self._others, texts, strict=True):
            state = json.loads(text)
            if state != self._states.get(rank, {}):
                self._states[rank], self._last_change_times[rank] = state, now
                self._lost.pop(rank, None)  # a rank that counted as lost was only slow
                continue
            silence = now - self._last_change_times[rank]
            if not state.get("has_read_ends") and silence > LOST_AFTER_SECONDS:
                self._lost[rank] = (
                    f"rank {rank} is gone: no heartbeat for {LOST_AFTER_SECONDS:.0f} s."
                )

    def _is_cut_off(self) -> bool:
        """Whether the store is out of reach.

        A call of the store may hang without an error, so the time since the last read counts, too.
        """
        silence = time.monotonic() - self._last_read_time
        return _STORE_HOST in self._lost or silence > LOST_AFTER_SECONDS

    def _has_ended(self, rank: int) -> bool:
        return rank in self._lost or bool(self._states.get(rank, {}).get("ended"))

    def _has_left(self, rank: int) -> bool:
        return rank in self._lost or bool(self._states.get(rank, {}).get("has_read_ends"))

    def _remote_error(self) -> Exception | None:
        """Return the error of another rank that this rank must raise, or None."""
        if not self._others:
            return None
        for rank, state in sorted(self._states.items()):
            if state.get("fault"):
                return deserialize_error(rank, state["fault"])
        if self._lost:
            return RankLostError(" ".join(self._lost.values()))
        if self._is_cut_off():
            return RankLostError("the process that hosts the store does not answer.")
        return None
