"""Parameters, sharded or not, seen alike: which rows are ours, filling and gathering them.

FSDP2 cuts dimension 0 as `torch.chunk` does. W_q, scale and zero share that dimension (whole
output rows, or row classes), so a rank's rows of the three belong to one another. FSDP1 and ZeRO-3
cut elsewhere, but get a model that was filled before (`spread.py`).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp._common_utils import _is_fsdp_flattened
from torch.distributed.tensor import DTensor

from hqqtrain.dist import zero3
from hqqtrain.dist.processes import Processes


class Copies(NamedTuple):
    """How many ranks hold the same part of a parameter, which of them this one is, and the group
    in which they can share it (None: all ranks)."""

    size: int
    rank: int
    group: ProcessGroup | None


def copies(param: Tensor, processes: Processes) -> Copies:
    """All ranks hold a parameter that is not sharded; of one that is, its replicas, if any."""
    if not isinstance(param, DTensor):
        return Copies(processes.size, processes.rank, None)
    mesh = param.device_mesh
    if mesh.ndim == 1:
        return Copies(1, 0, None)
    return Copies(mesh.size(0), mesh.get_local_rank(0), mesh.get_group(0))


def owned_rows(param: Tensor) -> slice:
    """The rows of the whole parameter that this rank holds; all of them when not sharded."""
    if not isinstance(param, DTensor):
        return slice(0, param.shape[0])
    mesh, rows = param.device_mesh, param.shape[0]
    last = mesh.ndim - 1  # before it, if anything, the replicas
    share = -(-rows // mesh.size(last))
    start = min(mesh.get_local_rank(last) * share, rows)
    stop = min(start + share, rows)
    assert stop - start == param.to_local().shape[0]
    return slice(start, stop)


def local(param: Tensor) -> Tensor:
    """The part of `param` on this rank, sharing its memory."""
    if zero3.is_partitioned(param):
        return param.ds_tensor  # type: ignore[attr-defined]
    param = param.detach()
    return param.to_local() if isinstance(param, DTensor) else param


def is_sharded(param: Tensor) -> bool:
    """Whether `local` is but a part of it, by any engine."""
    return isinstance(param, DTensor) or zero3.is_partitioned(param) or _is_fsdp_flattened(param)


def count(param: Tensor) -> int:
    """How many numbers the whole parameter has."""
    return param.ds_numel if zero3.is_partitioned(param) else param.numel()  # type: ignore[attr-defined]


def write_full(param: Tensor, full: Tensor) -> None:
    """Copies this rank's rows of `full` into `param`."""
    local(param).copy_(full[owned_rows(param)])


def full_tensor(param: Tensor) -> Tensor:
    """The whole parameter, bit for bit, on every rank. Collective where it is sharded.

    Not for those that FSDP1 has flattened.
    """
    if zero3.is_partitioned(param):
        return zero3.gathered(param)
    assert not _is_fsdp_flattened(param)
    param = param.detach()
    if not isinstance(param, DTensor):
        return param
    there: Any = param.to(param.device_mesh.device_type)  # it may wait on the host
    return there.full_tensor()


def materialise(model: nn.Module, device: torch.device, *, offload: bool = False) -> None:
    """Gives every meta tensor (uninitialised) memory on `device`; tied parameters stay tied.

    With `offload` parameters get it on the host. (`nn.Module.to_empty` would untie them.)
    """
    made: dict[Tensor, Any] = {}
    for module in model.modules():
        held: dict[str, Any]
        for held in (module._parameters, module._buffers):
            on_host = offload and held is module._parameters
            for name, tensor in held.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if tensor not in made:
                    made[tensor] = _real(tensor, torch.device("cpu") if on_host else device)
                held[name] = made[tensor]


def _real(tensor: Tensor, device: torch.device) -> Tensor:
    memory = torch.empty_like(tensor, device=device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(memory, requires_grad=tensor.requires_grad)
    return memory
