"""A copy of the training state in host memory, taken between two steps.

Training waits only for the copy; a thread writes it to disk later. On a GPU the copy goes to pinned
memory and is queued behind the step that made the state, so that not even the host waits.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from hqqtrain.distributed.comm import Communicator
from hqqtrain.distributed.gather import LocalShard, gather_to_rank0

BLOCK_BYTES, ALIGNMENT = 1 << 26, 64
"""Bytes that are allocated at a time, and the alignment of each tensor in bytes."""


class StateSnapshot:
    """Rank 0's host buffers for full tensors, allocated once and reused for every copy."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._pinned = comm.device.type == "cuda"
        self._memory: dict[str, Tensor] = {}
        self._free = torch.empty(0, dtype=torch.uint8)
        self._copied: torch.cuda.Event | None = None

    def take(self, pieces: Mapping[str, LocalShard]) -> None:
        """Gather the tensors of `pieces` and copy them to the host of rank 0. Collective.

        This overwrites the previous copy, which the caller must not read any more. A tensor whose
        shards do not form one tensor is copied as `name/0`, `name/1`, ...
        """
        names, old, self._memory = list(pieces), self._memory, {}
        for number, parts in gather_to_rank0(list(pieces.values()), self._comm):
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
        """Wait for the copy and return it by name. Empty on ranks other than 0."""
        if self._copied:
            self._copied.synchronize()
        return self._memory

    def _copy(
        self, name: str, parts: list[Tensor], shape: torch.Size, old: Mapping[str, Tensor]
    ) -> None:
        """Copy the concatenated `parts`, without the padding that flat sharding adds at the end."""
        target, dtype = old.get(name), parts[0].dtype
        if target is None or (target.shape, target.dtype) != (shape, dtype):
            target = self._allocate(shape, dtype)
        self._memory[name] = target
        flat, start = target.view(-1), 0
        for part in parts:
            stop = min(start + part.numel(), flat.numel())
            flat[start:stop].copy_(part.detach().reshape(-1)[: stop - start], non_blocking=True)
            start = stop
        assert start == flat.numel(), f"{name}: its shards are smaller than the full tensor"

    def _allocate(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Allocate from a large block, because pinning thousands of tensors one by one is slow."""
        size = -(-shape.numel() * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        if size > self._free.numel():
            block = max(size, BLOCK_BYTES)
            self._free = torch.empty(block, dtype=torch.uint8, pin_memory=self._pinned)
        buffer, self._free = self._free[:size], self._free[size:]
        return buffer[: shape.numel() * dtype.itemsize].view(dtype).view(shape)
