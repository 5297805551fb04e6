"""Gather sharded tensors on rank 0, to save them.

One collective carries many tensors, because gathering each tensor by itself would take thousands of
collectives for the adapter of a large model. Only rank 0 ever holds full tensors.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from hqqtrain.distributed.comm import Communicator
from hqqtrain.distributed.strategies import zero3

GATHER_BYTES = 1 << 27
"""Bytes that rank 0 receives in one collective, from all ranks together."""


class LocalShard(NamedTuple):
    """This rank's shard of a tensor.

    Attributes:
        tensor: The shard.
        full_shape: Shape of the full tensor; None if the shards do not form one tensor.
        owners: The ranks whose flattened shards, concatenated in this order, are the full tensor.
    """

    tensor: Tensor
    full_shape: torch.Size | None
    owners: tuple[int, ...]


def local_shard_of(
    param: Tensor, tensor: Tensor, full_shape: torch.Size | None = None
) -> LocalShard:
    """Describe a tensor that is sharded like `param`, such as its gradient or optimizer state.

    Args:
        param: The parameter whose sharding decides the owners.
        tensor: This rank's shard of the tensor.
        full_shape: Shape of the full tensor; None if the shards do not form one tensor.
    """
    if zero3.is_partitioned(param):
        owners = tuple(range(dist.get_world_size()))
    elif isinstance(param, DTensor):  # the ranks of the first replica
        mesh = param.device_mesh.mesh
        owners = tuple(mesh.reshape(-1, mesh.shape[-1])[0].tolist())
    else:
        owners = (0,)
    return LocalShard(tensor, full_shape, owners)


def shard_index_and_count(param: Tensor) -> tuple[int, int]:
    """Return (index of this rank's shard of `param`, number of shards)."""
    if zero3.is_partitioned(param):
        return dist.get_rank(), dist.get_world_size()
    if isinstance(param, DTensor):
        shard_dim = param.device_mesh.ndim - 1  # a replicate dimension may precede it
        return param.device_mesh.get_local_rank(shard_dim), param.device_mesh.size(shard_dim)
    return 0, 1


def gather_to_rank0(
    local_shards: Sequence[LocalShard], comm: Communicator
) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield (index, shards of all owners) for each tensor on rank 0, and nothing on other ranks.

    The caller must copy the shards before it asks for the next tensor: their memory is reused.
    Every rank must pass its shards of the same tensors in the same order, and exhaust the iterator.
    Collective.
    """
    # Rank 0 has some full tensors already; they need no communication.
    if comm.is_main:
        for index, shard in enumerate(local_shards):
            if shard.owners == (0,):
                yield index, [shard.tensor]
    sharded = [index for index, shard in enumerate(local_shards) if shard.owners != (0,)]
    if not sharded:
        return
    # Shards differ in size between ranks and may be empty, so ranks first exchange the specs.
    tensors = [local_shards[index].tensor.detach() for index in sharded]
    specs = comm.all_gather_object([(t.dtype, t.shape) for t in tensors])  # [rank][shard]
    for chunk in _chunks(specs):
        by_rank = _gather_chunk(
            [tensors[n] for n in chunk], [[of_rank[n] for n in chunk] for of_rank in specs], comm
        )
        if not comm.is_main:
            continue
        # Keep the shards of the owners, in their order: with hybrid sharding the other replicas
        # send copies.
        for position, n in enumerate(chunk):
            owners = local_shards[sharded[n]].owners
            yield sharded[n], [by_rank[rank][position] for rank in owners]


ShardSpecs = list[tuple[torch.dtype, torch.Size]]
"""Dtype and shape of each shard of one rank."""


def _chunks(specs: list[ShardSpecs]) -> Iterator[list[int]]:
    """Split the shards into chunks of about `GATHER_BYTES` bytes over all ranks.

    The shard that reaches the limit is the last one of its chunk.

    Yields:
        The positions of the shards of a chunk.
    """
    chunk: list[int] = []
    size = 0
    for number in range(len(specs[0])):
        chunk.append(number)
        # Every rank sends a buffer as large as the largest one, so count the largest shard.
        size += len(specs) * max(_padded_bytes(*of_rank[number]) for of_rank in specs)
        if size >= GATHER_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _gather_chunk(
    shards: list[Tensor], specs: list[ShardSpecs], comm: Communicator
) -> list[list[Tensor]]:
    """Return the shards of every rank on rank 0, and nothing on other ranks. Collective."""
    # `dist.gather` needs buffers of one size on all ranks: the largest one.
    size = max(sum(_padded_bytes(*spec) for spec in of_rank) for of_rank in specs)
    send = torch.empty(size, dtype=torch.uint8, device=comm.device)
    # Pack this rank's shards into one byte buffer, whatever their dtypes.
    for shard, view in zip(shards, _views(send, specs[comm.rank]), strict=True):
        view.copy_(shard)
    received = [torch.empty_like(send) for _ in specs] if comm.is_main else None
    dist.gather(send, received)
    if received is None:
        return []
    # Unpack each buffer by the specs of the rank that sent it.
    return [list(_views(buffer, of_rank)) for buffer, of_rank in zip(received, specs, strict=True)]


def _views(buffer: Tensor, specs: ShardSpecs) -> Iterator[Tensor]:
    """Yield a view into `buffer` for each shard."""
    offset = 0
    for dtype, shape in specs:
        size = shape.numel() * dtype.itemsize
        yield buffer[offset : offset + size].view(dtype).view(shape)
        offset += _padded_bytes(dtype, shape)


def _padded_bytes(dtype: torch.dtype, shape: torch.Size) -> int:
    """Bytes of a shard, padded to 16 so that the next one is aligned for any dtype."""
    return -(-shape.numel() * dtype.itemsize // 16) * 16
