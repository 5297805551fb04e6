"""Heartbeat between ranks that work for minutes without a collective.

If one rank fails or vanishes, the others would work until their next collective and wait there for
half an hour, NCCL's time-out. So each rank writes to the process group's store that it is alive and
how its work ended, and reads the state of the others. This needs no collective.
"""

import json
import threading
import time
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch.distributed as dist

from hqqtrain.common.errors import PreemptedError, RankLostError, UserError
from hqqtrain.compat import default_store
from hqqtrain.distributed.comm import Communicator, deserialize_error, serialize_error

HEARTBEAT_SECONDS = 0.5
"""Seconds between two heartbeats."""

LOST_AFTER_SECONDS = 20.0
"""Seconds without a heartbeat after which a rank counts as lost.

A thread sends the heartbeats. The long calls of torch and safetensors release the GIL, so it is
delayed by seconds at most.
"""

RemoteError = UserError | PreemptedError | RankLostError
"""Errors that `Heartbeat` raises for another rank."""

_STORE_HOST = -1
"""Key of `Heartbeat._lost` for the process that hosts the store."""


class Heartbeat:
    """Context around work that each rank does on its own; the body must call `check` often.

    All ranks enter and leave the context together. An error of one rank is raised on every rank: a
    UserError or PreemptedError unchanged, any other error, or a rank that is gone, as RankLostError
    on the other ranks. Collective.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._others = [rank for rank in range(comm.size) if rank != comm.rank]
        self._end_state: dict[str, Any] = {}  # what this rank reports once its work has ended
        self._end_is_reported = False
        self._states: dict[int, dict[str, Any]] = {}  # the last state read from each rank
        self._lost: dict[int, str] = {}  # rank -> message
        self._store: Any = None  # where the ranks exchange their states, from `__enter__` on
        self._read_at = time.monotonic()
        self._changed_at: dict[int, float] = {}  # rank -> time at which its state was new
        self._raised: RemoteError | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        if self._others:
            # A connection of its own, because the thread uses it while torch may use the first.
            default: Any = default_store()
            self._store = dist.PrefixStore(self._comm.unique_key("heartbeat"), default.clone())
            self._store.set_timeout(timedelta(seconds=LOST_AFTER_SECONDS))
            # After the barrier the keys of all ranks exist, so `_read_states` never blocks on one.
            self._store.set(str(self._comm.rank), "{}")
            self._comm.barrier()
            self._read_at = time.monotonic()
            self._changed_at = dict.fromkeys(self._others, self._read_at)
            self._thread.start()
        return self

    def check(self) -> None:
        """Raise the error of another rank, if any.

        Raises:
            UserError: Another rank has raised it.
            PreemptedError: Likewise.
            RankLostError: Another rank has raised any other error, or is gone.
        """
        self._raised = self._error()
        if self._raised:
            raise self._raised

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        if not self._others:
            return
        # Report only errors of this rank: one that `check` has raised is known to the others.
        own = None if error is self._raised else error
        self._end_state = {"ended": True, "fault": serialize_error(own)}
        # On KeyboardInterrupt or SystemExit, leave at once.
        if error is None or isinstance(error, Exception):
            self._wait_for_others()
        self._over.set()
        self._thread.join(2 * HEARTBEAT_SECONDS)
        if error is None:
            # Another rank may have failed after this one was done.
            self.check()
            # The host of the store must not exit before the others have read the last states.
            self._comm.barrier()

    def _wait_for_others(self) -> None:
        """Wait until the end is reported and all others have ended or are lost.

        A rank that has failed waits, too: it may host the store, where the others read the error.
        """
        while not (self._end_is_reported and all(map(self._has_ended, self._others))):
            if self._is_cut_off():
                return
            time.sleep(HEARTBEAT_SECONDS / 5)

    def _run(self) -> None:
        """Body of the thread: send a heartbeat and read the others', until the work is over."""
        beats = 0
        try:
            while not self._over.wait(HEARTBEAT_SECONDS):
                # The counter changes the state, which is what proves that this rank is alive.
                beats += 1
                state = {"beat": beats} | self._end_state
                self._store.set(str(self._comm.rank), json.dumps(state))
                self._end_is_reported = bool(state.get("ended"))
                self._read_states()
        except RuntimeError as error:
            # The store raises when its host is gone, or does not answer within LOST_AFTER_SECONDS.
            self._lost[_STORE_HOST] = f"the process that hosts the store is gone ({error})."

    def _read_states(self) -> None:
        """Read the states of the other ranks and note those that have not changed for too long."""
        texts = self._store.multi_get([str(rank) for rank in self._others])
        now = time.monotonic()
        # If this process itself was suspended, as by a debugger, the others had no chance to be
        # seen: start their time again.
        if now - self._read_at > LOST_AFTER_SECONDS / 4:
            self._changed_at = dict.fromkeys(self._others, now)
        self._read_at = now
        for rank, text in zip(self._others, texts, strict=True):
            state = json.loads(text)
            if state != self._states.get(rank, {}):
                self._states[rank], self._changed_at[rank] = state, now
                self._lost.pop(rank, None)  # it was only slow
            elif not state.get("ended") and now - self._changed_at[rank] > LOST_AFTER_SECONDS:
                self._lost[rank] = (
                    f"rank {rank} is gone: no heartbeat for {LOST_AFTER_SECONDS:.0f} s."
                )

    def _is_cut_off(self) -> bool:
        """Whether the store is out of reach; it may hang without an error."""
        return _STORE_HOST in self._lost or time.monotonic() - self._read_at > LOST_AFTER_SECONDS

    def _has_ended(self, rank: int) -> bool:
        return rank in self._lost or bool(self._states.get(rank, {}).get("ended"))

    def _error(self) -> RemoteError | None:
        """Return the error to raise on this rank, None if all is well."""
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
