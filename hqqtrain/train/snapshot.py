"""A copy of a training's state in the host's memory, taken between two steps.

Copying is all that training waits for; the disk has the copy to itself. On a GPU it is queued
behind the step that made the state, into pinned memory, so not even the host waits.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from hqqtrain.dist import Piece, Processes, gathered_pieces

BLOCK, ALIGNED = 1 << 26, 64
"""Bytes of memory that are asked for at a time, and that a tensor begins at a multiple of."""


class Snapshot:
    """The first rank's memory for whole tensors, made once and used again for every copy."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._pinned = processes.device.type == "cuda"
        self._memory: dict[str, Tensor] = {}
        self._free = torch.empty(0, dtype=torch.uint8)
        self._copied: torch.cuda.Event | None = None

    def take(self, pieces: Mapping[str, Piece]) -> None:
        """Copies what `pieces` are of; the last copy must not be read any more. Collective."""
        names, old, self._memory = list(pieces), self._memory, {}
        for number, parts in gathered_pieces(list(pieces.values()), self._processes):
            shape = pieces[names[number]].shape
            if shape is None:
                for owner, part in enumerate(parts):
                    self._copy(f"{names[number]}/{owner}", [part], part.shape, old)
            else:
                self._copy(names[number], parts, shape, old)
        if self._pinned:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def tensors(self) -> dict[str, Tensor]:
        """The copy, on the host; waits until it is there. Empty on other ranks."""
        if self._copied:
            self._copied.synchronize()
        return self._memory

    def _copy(
        self, name: str, parts: list[Tensor], shape: torch.Size, old: Mapping[str, Tensor]
    ) -> None:
        """What engines that cut flat have added at the end stays away."""
        room, dtype = old.get(name), parts[0].dtype
        if room is None or (room.shape, room.dtype) != (shape, dtype):
            room = self._room(shape, dtype)
        self._memory[name] = room
        there, at = self._memory[name].view(-1), 0
        for part in parts:
            stop = min(at + part.numel(), there.numel())
            there[at:stop].copy_(part.detach().reshape(-1)[: stop - at], non_blocking=True)
            at = stop
        assert at == there.numel(), f"{name}: its parts are not the whole"

    def _room(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """From a large block: to pin each of a thousand tensors by itself takes longer."""
        size = -(-shape.numel() * dtype.itemsize // ALIGNED) * ALIGNED
        if size > self._free.numel():
            many = max(size, BLOCK)
            self._free = torch.empty(many, dtype=torch.uint8, pin_memory=self._pinned)
        room, self._free = self._free[:size], self._free[size:]
        return room[: shape.numel() * dtype.itemsize].view(dtype).view(shape)
