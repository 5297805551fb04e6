"""FSDP2: each decoder layer is one FSDP module, sharded by rows on the meta device."""

import logging
from collections.abc import Sequence

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

from hqqtrain.common.errors import UserError
from hqqtrain.common.text import count
from hqqtrain.config.conflicts import Conflict
from hqqtrain.distributed.strategies.base import (
    BITSANDBYTES_OPTIMIZERS,
    Capabilities,
    Strategy,
    ensure_process_group,
    probe_layer,
)
from hqqtrain.models.families.structure import decoder_layers, describe_decoder_layers

logger = logging.getLogger(__name__)

SHARDS_UINT8 = Version(torch.__version__) >= Version("2.12")
"""FSDP2 of torch 2.11 crashes on frozen uint8 parameters."""

_UINT8_CONFLICT = Conflict(
    {"quant.storage_dtype": ("uint8",)},
    f"FSDP2 of torch {torch.__version__} cannot shard uint8 parameters; use bf16 (the same bits, "
    "viewed), or torch 2.12 and newer.",
)


class FSDP2(Strategy):
    """Shards the model by rows, over all ranks or over those of a replica."""

    name = "fsdp2"
    supports = Capabilities(
        parameter_offload="always",
        hsdp=True,
        conflicts=(
            Conflict(
                {"optim.name": BITSANDBYTES_OPTIMIZERS, "train.precision": ("fp16",)},
                "does not support the gradient scaling that train.precision=fp16 needs, under "
                "parallel.strategy=fsdp2; use bf16, or adamw.",
            ),
            *(() if SHARDS_UINT8 else (_UINT8_CONFLICT,)),
        ),
    )
    shards_parameters = True
    shards_adapters = True

    @classmethod
    def resolve_storage_dtype(cls, wanted: str, compute: torch.dtype) -> torch.dtype:
        """Resolve `quant.storage_dtype`; before torch 2.12, `auto` is bf16, with the same bits."""
        if wanted == "auto" and not SHARDS_UINT8:
            return torch.bfloat16
        return super().resolve_storage_dtype(wanted, compute)

    def shard(self, model: nn.Module) -> None:
        """Shard each decoder layer of `model`, then the rest, on the meta device. Collective.

        Raises:
            UserError: The model has no stack of decoder layers.
        """
        ensure_process_group(self.comm.size)
        mesh = self._mesh()
        layers, description = decoder_layers(model), describe_decoder_layers(model)
        policy = CPUOffloadPolicy() if self.offloads_parameters else OffloadPolicy()
        for module in (*layers, model):
            fully_shard(module, mesh=mesh, offload_policy=policy)
        logger.info(
            "fsdp2: decoder layers: %s, sharded over %s, replicas: %d",
            description,
            count(self.comm.size // self.replicas, "rank"),
            self.replicas,
        )

    def roundtrip(self, weight: Tensor) -> Tensor:
        """Return `weight` after FSDP2 has sharded it over all ranks and gathered it. Collective."""
        ensure_process_group(self.comm.size)
        module = probe_layer(weight)
        mesh = init_device_mesh(self.comm.device.type, (self.comm.size,))
        fully_shard(module, mesh=mesh).unshard()
        return module.get_parameter("W_q").detach()

    def gathered_bytes(self, world_size: int, *, root: int, layers: int, itemsize: int) -> int:
        """Add the buffer of the all-gather to the bytes of the base class.

        The buffer is as large as the gathered parameters. With offloading no shard is on the
        device, so all of the gathered bytes come in addition.
        """
        if self.offloads_parameters:
            return 2 * root
        gathered = super().gathered_bytes(world_size, root=root, layers=layers, itemsize=itemsize)
        return gathered + (root if self.parameter_shards(world_size) > 1 else 0)

    def _mesh(self) -> DeviceMesh:
        """Return a mesh of all ranks, or one that replicates over blocks of consecutive ranks."""
        device, size = self.comm.device.type, self.comm.size
        if self.replicas == 1:
            return init_device_mesh(device, (size,))
        shape = (self.replicas, size // self.replicas)
        return init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))


def count_replicas(local_sizes: Sequence[int]) -> int:
    """Return the number of nodes, each of which has a replica under `parallel.hsdp=true`.

    Args:
        local_sizes: For every rank, the number of ranks on its node; 0 if the launcher did not set
            it.

    Raises:
        UserError: The nodes are of different or unknown sizes.
    """
    world_size, local_size = len(local_sizes), local_sizes[0]
    if world_size == 1:
        local_size = 1
    elif set(local_sizes) != {local_size} or not local_size or world_size % local_size:
        sizes = ", ".join(map(str, sorted(set(local_sizes))))
        raise UserError(
            f"parallel.hsdp=true: {world_size} ranks are not whole nodes of {sizes}: start "
            "the same number on every node, with LOCAL_WORLD_SIZE set as torchrun does, or set "
            "parallel.hsdp=false."
        )
    if world_size == local_size:
        logger.warning("parallel.hsdp=true: all ranks are on one node, so nothing is replicated")
    return world_size // local_size
