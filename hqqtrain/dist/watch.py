"""Ranks that work for minutes without a collective hear soon when one of them fails or is gone.

Else the others would go on until they meet, and there wait for a rank that never comes: half an
hour of NCCL's patience. So each rank says in the process group's store that it is alive, and how
its work ended, and looks at what the others say. No collective is needed to stop, or to go on.
"""

import json
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from hqqtrain.config import RankLostError, UserError
from hqqtrain.dist.processes import Processes

BEAT = 0.5
"""Seconds between two looks."""
LOST_AFTER = 20.0
"""Seconds without a sign of life. It comes from a thread, which is held up for seconds at most:
the long calls of torch and safetensors let it run."""


class Watch:
    """A context around work of which every rank has its own part; `check` often within it.

    All ranks leave it together. What one rank raises is raised on every rank: a UserError as it is,
    anything else, also that a rank is gone, as RankLostError on the others.
    """

    def __init__(self, processes: Processes) -> None:
        self._me = processes.rank
        self._others = [rank for rank in range(processes.size) if rank != processes.rank]
        self._states: dict[int, dict[str, Any]] = {}
        self._changed: dict[int, float] = {}
        self._lost: dict[int, str] = {}
        self._beats, self._is_cut_off = 0, False
        self._raised: UserError | RankLostError | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look_around, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
        if self._others:
            shared: Any = _get_default_store()
            self._store = dist.PrefixStore(_next_name(), shared.clone())  # a connection of its own
            self._store.set_timeout(timedelta(seconds=LOST_AFTER))
            self._changed = dict.fromkeys(self._others, time.monotonic())
            self._thread.start()
        return self

    def check(self) -> None:
        """Raises what another rank has raised, or RankLostError if one is gone."""
        self._raised = self._fault()
        if self._raised:
            raise self._raised

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        if not self._others:
            return
        self._over.set()
        self._thread.join()
        own = None if error is self._raised else error
        self._say(ended=True, user=isinstance(own, UserError), fault=_told(own))
        if error is not None and not isinstance(error, Exception):
            return  # a signal: there is no time to wait
        self._wait_for_others()
        if error is None:
            self.check()

    def _wait_for_others(self) -> None:
        """Also where this rank has failed: the store may be its own, and they read why in it."""
        while not self._is_cut_off and not all(map(self._has_ended, self._others)):
            time.sleep(BEAT / 5)
            self._look()

    def _look_around(self) -> None:
        while not self._over.wait(BEAT):
            self._beats += 1
            self._say(beat=self._beats)
            self._look()

    def _say(self, **state: Any) -> None:
        self._asked(self._store.set, str(self._me), json.dumps(state))

    def _look(self) -> None:
        """At what the others have said last, and since when."""
        for rank in self._others:
            text = self._asked(self._read, str(rank))
            state, now = json.loads(text or "{}"), time.monotonic()
            if state != self._states.get(rank, {}):
                self._states[rank], self._changed[rank] = state, now
            elif not state.get("ended") and now - self._changed[rank] > LOST_AFTER:
                self._lost[rank] = f"rank {rank} is gone: no sign of life for {LOST_AFTER:.0f} s."

    def _read(self, key: str) -> bytes:
        return self._store.get(key) if self._store.check([key]) else b""

    def _asked(self, ask: Callable[..., Any], *arguments: str) -> Any:
        try:
            return ask(*arguments)
        except RuntimeError as error:
            self._is_cut_off = True
            self._lost[-1] = f"the process that holds the ranks together is gone ({error})."

    def _has_ended(self, rank: int) -> bool:
        return rank in self._lost or bool(self._states.get(rank, {}).get("ended"))

    def _fault(self) -> UserError | RankLostError | None:
        for rank, state in sorted(self._states.items()):
            if state.get("fault"):
                failed = f"rank {rank} failed: {state['fault']}"
                return UserError(state["fault"]) if state["user"] else RankLostError(failed)
        return RankLostError(" ".join(self._lost.values())) if self._lost else None


def _told(error: BaseException | None) -> str:
    if error is None or isinstance(error, UserError):
        return str(error or "")
    return f"{type(error).__name__}: {error}"


_count = 0


def _next_name() -> str:
    """Every watch has keys of its own; all ranks make them in the same order."""
    global _count
    _count += 1
    return f"hqqtrain watch {_count}"
