"""Access to parameters, sharded or not: rows of this rank, local tensor, full tensor.

FSDP2 shards dimension 0 as `torch.chunk` does. W_q, scale and zero share that dimension (whole
output rows, or row classes), so a rank's rows of all three describe the same weights. FSDP1 and
ZeRO-3 shard flat memory instead, but receive a model that is already loaded (`row_sharding.py`).
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hqqtrain.compat import is_fsdp1_flattened, zero3_shape, zero3_shard
from hqqtrain.distributed.comm import Communicator
from hqqtrain.distributed.strategies import zero3


class ReplicaGroup(NamedTuple):
    """The ranks that hold the same shard of a parameter as this rank.

    Attributes:
        size: Number of these ranks.
        rank: Index of this rank among them.
        group: The process group to broadcast in; None: all ranks.
    """

    size: int
    rank: int
    group: ProcessGroup | None


def replica_group(param: Tensor, comm: Communicator) -> ReplicaGroup:
    """Return the replica group of `param`.

    All ranks hold a parameter that is not sharded. A single rank holds a shard, or with hybrid
    sharding one rank of each replica.
    """
    if not isinstance(param, DTensor):
        return ReplicaGroup(comm.size, comm.rank, None)
    mesh = param.device_mesh
    if mesh.ndim == 1:
        return ReplicaGroup(1, 0, None)
    return ReplicaGroup(mesh.size(0), mesh.get_local_rank(0), mesh.get_group(0))


def local_rows(param: Tensor) -> slice:
    """Return the rows of the full parameter that this rank holds: all rows if it is not sharded.

    A scalar counts as one row.
    """
    if not isinstance(param, DTensor):
        return slice(0, param.shape[0] if param.dim() else 1)
    mesh, rows = param.device_mesh, param.shape[0]
    shard_dim = mesh.ndim - 1  # a replicate dimension may precede it
    rows_per_rank = -(-rows // mesh.size(shard_dim))  # rounded up, as in torch.chunk
    start = min(mesh.get_local_rank(shard_dim) * rows_per_rank, rows)
    stop = min(start + rows_per_rank, rows)
    assert stop - start == param.to_local().shape[0]
    return slice(start, stop)


def local_tensor(param: Tensor) -> Tensor:
    """Return the part of `param` on this rank, sharing its memory."""
    if (shard := zero3_shard(param)) is not None:
        return shard
    param = param.detach()
    return param.to_local() if isinstance(param, DTensor) else param


def reshard(model: nn.Module) -> None:
    """Free what FSDP2 has gathered, so that the parameters of `model` are shards again.

    FSDP2 leaves the root unsharded after a forward pass without a backward pass, as in an
    evaluation. Its gathered parameters are other objects than the shards, which are trained.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_sharded(param: Tensor) -> bool:
    """Whether this rank holds only a part of `param`, under any strategy."""
    return isinstance(param, DTensor) or zero3.is_partitioned(param) or is_fsdp1_flattened(param)


def global_numel(param: Tensor) -> int:
    """Number of elements of the full parameter."""
    return (zero3_shape(param) if zero3.is_partitioned(param) else param.shape).numel()


def copy_from_full(param: Tensor, full: Tensor) -> None:
    """Copy this rank's rows of `full` into `param`. Collective if ZeRO-3 has sharded it."""
    if zero3.is_partitioned(param):
        zero3.set_parameter(param, full)
        return
    local_tensor(param).copy_(full[local_rows(param)])


def full_tensor(param: Tensor) -> Tensor:
    """Return the full parameter, bit for bit, on every rank. Collective if it is sharded.

    Parameters that FSDP1 has flattened are not supported.
    """
    if zero3.is_partitioned(param):
        return zero3.gather_parameter(param)
    assert not is_fsdp1_flattened(param)
    param = param.detach()
    if not isinstance(param, DTensor):
        return param
    # With offloading the shard is on the host.
    on_device: Any = param.to(param.device_mesh.device_type)
    return on_device.full_tensor()


def materialize(model: nn.Module, device: torch.device, *, on_host: Iterable[Tensor] = ()) -> None:
    """Allocate uninitialized memory on `device` for every meta tensor of `model`.

    Tied parameters stay tied, which `nn.Module.to_empty` does not guarantee.

    Args:
        model: Changed in place.
        device: Device of the tensors that are not on the host.
        on_host: The parameters to allocate on the host.
    """
    host_ids = {id(param) for param in on_host}
    allocated: dict[Tensor, Tensor] = {}  # meta tensor -> tensor in memory
    for module in model.modules():
        direct: dict[str, Any] = {"recurse": False, "remove_duplicate": False}
        for name, meta in (*module.named_parameters(**direct), *module.named_buffers(**direct)):
            if not meta.is_meta:
                continue
            if meta not in allocated:
                is_param = isinstance(meta, nn.Parameter)
                memory = torch.empty_like(meta, device="cpu" if id(meta) in host_ids else device)
                allocated[meta] = nn.Parameter(memory, meta.requires_grad) if is_param else memory
            setattr(module, name, allocated[meta])
