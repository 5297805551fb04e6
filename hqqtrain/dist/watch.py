"""Ranks that work for minutes without a collective hear soon when one of them fails or is gone.

Else the others would go on until they meet, and there wait for a rank that never comes: half an
hour of NCCL's patience. So each rank says in the process group's store that it is alive, and how
its work ended, and looks at what the others say. No collective is needed to stop, or to go on.
"""

import json
import threading
import time
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from hqqtrain.config import PreemptedError, RankLostError, UserError
from hqqtrain.dist.processes import Processes, retold, tell

BEAT = 0.5
"""Seconds between two looks."""
LOST_AFTER = 20.0
"""Seconds without a sign of life. It comes from a thread, which is held up for seconds at most:
the long calls of torch and safetensors let it run."""


Shown = UserError | PreemptedError | RankLostError


class Watch:
    """A context around work of which every rank has its own part; `check` often within it.

    All ranks enter and leave it together. What one rank raises is raised on every rank: a UserError
    or PreemptedError as it is, anything else, also that a rank is gone, as RankLostError on the
    others. Collective.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._others = [rank for rank in range(processes.size) if rank != processes.rank]
        self._mine: dict[str, Any] = {}
        self._told = False
        self._states: dict[int, dict[str, Any]] = {}
        self._lost: dict[int, str] = {}
        self._raised: Shown | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look_around, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
        if self._others:
            shared: Any = _get_default_store()
            self._store = dist.PrefixStore(_next_name(), shared.clone())  # a connection of its own
            self._store.set_timeout(timedelta(seconds=LOST_AFTER))
            self._store.set(str(self._processes.rank), "{}")
            self._processes.barrier()
            self._looked = time.monotonic()
            self._changed = dict.fromkeys(self._others, self._looked)
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
        own = None if error is self._raised else error
        self._mine = {"ended": True, "fault": tell(own)}
        if error is None or isinstance(error, Exception):  # else a signal: there is no time
            self._wait_for_others()
        self._over.set()
        self._thread.join(2 * BEAT)
        if error is None:
            self.check()
            self._processes.barrier()  # or the store's host may go before the others have looked

    def _wait_for_others(self) -> None:
        """Also where this rank has failed: the store may be its own, and they read why in it."""
        while not (self._told and all(map(self._has_ended, self._others))):
            if self._is_cut_off():
                return
            time.sleep(BEAT / 5)

    def _look_around(self) -> None:
        beats = 0
        try:
            while not self._over.wait(BEAT):
                beats += 1
                self._say({"beat": beats} | self._mine)
                self._look()
        except RuntimeError as error:
            self._lost[-1] = f"the process that holds the ranks together is gone ({error})."

    def _say(self, state: dict[str, Any]) -> None:
        self._store.set(str(self._processes.rank), json.dumps(state))
        self._told = bool(state.get("ended"))

    def _look(self) -> None:
        """At what the others have said last, and since when."""
        texts = self._store.multi_get([str(rank) for rank in self._others])
        now = time.monotonic()
        if now - self._looked > LOST_AFTER / 4:  # this process itself was held up, as by a debugger
            self._changed = dict.fromkeys(self._others, now)
        self._looked = now
        for rank, text in zip(self._others, texts, strict=True):
            state = json.loads(text)
            if state != self._states.get(rank, {}):
                self._states[rank], self._changed[rank] = state, now
                self._lost.pop(rank, None)
            elif not state.get("ended") and now - self._changed[rank] > LOST_AFTER:
                self._lost[rank] = f"rank {rank} is gone: no sign of life for {LOST_AFTER:.0f} s."

    def _is_cut_off(self) -> bool:
        """Nothing is heard, not even from the store, which may hang without an error."""
        return -1 in self._lost or time.monotonic() - self._looked > LOST_AFTER

    def _has_ended(self, rank: int) -> bool:
        return rank in self._lost or bool(self._states.get(rank, {}).get("ended"))

    def _fault(self) -> Shown | None:
        if not self._others:
            return None
        for rank, state in sorted(self._states.items()):
            if state.get("fault"):
                return retold(rank, state["fault"])
        if self._lost:
            return RankLostError(" ".join(self._lost.values()))
        if self._is_cut_off():
            return RankLostError("the process that holds the ranks together does not answer.")
        return None


_count = 0


def _next_name() -> str:
    """Every watch has keys of its own; all ranks make them in the same order."""
    global _count
    _count += 1
    return f"hqqtrain watch {_count}"
