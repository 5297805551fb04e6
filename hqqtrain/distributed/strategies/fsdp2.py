"""FSDP2: one unit for each decoder layer, sharded by rows on the meta device."""

import logging

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

from hqqtrain.distributed.strategies.base import ensure_process_group
from hqqtrain.models.families.structure import decoder_layers

logger = logging.getLogger(__name__)


def apply_fsdp2(
    model: nn.Module, device: torch.device, world_size: int, replicas: int = 1,
    offload: bool = False,
) -> None:  # fmt: skip
    """Shard `model` with FSDP2, one unit per decoder layer; meta parameters stay on meta.

    Args:
        model: Changed in place.
        device: Device of this rank.
        world_size: Number of ranks.
        replicas: With 1, shard over all ranks. Otherwise shard within each of that many blocks of
            consecutive ranks, and replicate over the blocks.
        offload: Keep the shards on the host and copy them to `device` to gather them.

    Raises:
        UserError: The model has no stack of decoder layers.
    """
    ensure_process_group(world_size)
    mesh = _mesh(device, world_size, replicas)
    layers = decoder_layers(model)
    policy = CPUOffloadPolicy() if offload else OffloadPolicy()
    for part in (*layers, model):
        fully_shard(part, mesh=mesh, offload_policy=policy)
    logger.info(
        "fsdp2: %d decoder layers sharded over %d ranks, replicas: %d",
        len(layers), world_size // replicas, replicas,
    )  # fmt: skip


def _mesh(device: torch.device, world_size: int, replicas: int) -> DeviceMesh:
    if replicas == 1:
        return init_device_mesh(device.type, (world_size,))
    shape = (replicas, world_size // replicas)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
