"""A copy of the training state in host memory, taken between two steps.

Training waits only for the copy; a thread writes it to disk later. A copy from a GPU goes to pinned
memory and is queued behind the step that made the state, so that not even the host waits.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from hqqtrain.distributed.comm import Communicator
from hqqtrain.distributed.gather import LocalShard, gather_to_rank0

BLOCK_BYTES, ALIGNMENT_BYTES = 1 << 26, 64
"""Bytes that are allocated at a time, and the alignment of each tensor, that of a cache line."""


class StateSnapshot:
    """Rank 0's host buffers for full tensors, allocated once and reused for every copy."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._pinned = comm.device.type == "cuda"
        self._tensors: dict[str, Tensor] = {}
        self._free_block = torch.empty(0, dtype=torch.uint8)
        self._copy_end: torch.cuda.Event | None = None

    def take(self, local_shards: Mapping[str, LocalShard]) -> None:
        """Gather the tensors by name and copy them to the host of rank 0. Collective.

        The call overwrites the previous copy, which the caller must not read any more. Shards that
        do not form one tensor are copied as `name/0`, `name/1`, ...
        """
        names, reusable, self._tensors = list(local_shards), self._tensors, {}
        for index, shards in gather_to_rank0(list(local_shards.values()), self._comm):
            name = names[index]
            full_shape = local_shards[name].full_shape
            if full_shape is None:
                for owner, shard in enumerate(shards):
                    self._copy(f"{name}/{owner}", [shard], shard.shape, reusable)
            else:
                self._copy(name, shards, full_shape, reusable)
        if self._pinned:
            self._copy_end = torch.cuda.Event()
            self._copy_end.record()

    def tensors(self) -> dict[str, Tensor]:
        """Wait for the copy and return its tensors by name. Empty on ranks other than 0."""
        if self._copy_end:
            self._copy_end.synchronize()
        return self._tensors

    def _copy(
        self, name: str, shards: list[Tensor], shape: torch.Size, reusable: Mapping[str, Tensor]
    ) -> None:
        """Copy the concatenated `shards`, without the padding that flat sharding adds at the end.

        The target is the tensor `name` of `reusable` if its shape and dtype fit.
        """
        target, dtype = reusable.get(name), shards[0].dtype
        if target is None or (target.shape, target.dtype) != (shape, dtype):
            target = self._allocate(shape, dtype)
        self._tensors[name] = target
        flat, start = target.view(-1), 0
        for shard in shards:
            stop = min(start + shard.numel(), flat.numel())
            flat[start:stop].copy_(shard.detach().reshape(-1)[: stop - start], non_blocking=True)
            start = stop
        assert start == flat.numel(), f"{name}: its shards are smaller than the full tensor"

    def _allocate(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Allocate from a large block, because pinning thousands of tensors one by one is slow."""
        num_bytes = shape.numel() * dtype.itemsize
        aligned_bytes = -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        if aligned_bytes > self._free_block.numel():
            block_bytes = max(aligned_bytes, BLOCK_BYTES)
            self._free_block = torch.empty(block_bytes, dtype=torch.uint8, pin_memory=self._pinned)
        buffer = self._free_block[:num_bytes]
        self._free_block = self._free_block[aligned_bytes:]
        return buffer.view(dtype).view(shape)
