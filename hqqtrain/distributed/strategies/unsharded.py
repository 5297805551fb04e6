"""The strategies under which every process has the full model: a single process, and DDP."""

import torch
from torch import Tensor, nn

from hqqtrain.distributed.strategies.base import Capabilities, Strategy
from hqqtrain.models.offload import (
    layer_parameters,
    meta_parameters,
    offload_decoder_layers,
    offload_meta,
)


class Unsharded(Strategy):
    """Each process has the full model, on its device or partly in host memory."""

    def host_parameters(self, model: nn.Module) -> list[nn.Parameter]:
        if self.offloads_parameters:
            return layer_parameters(model)
        return meta_parameters(model) if self.offloads_meta else []

    def wrap(self, model: nn.Module) -> nn.Module:
        """Let what is in host memory be copied to the device ahead of use."""
        if self.offloads_parameters:
            offload_decoder_layers(model, self.comm.device)
        elif self.offloads_meta:
            offload_meta(model)
        return model


class SingleProcess(Unsharded):
    """No parallelism: the model stays as it is."""

    name = "single"
    supports = Capabilities(
        several_processes=False, meta_offload=True, parameter_offload="without training"
    )


class DDP(Unsharded):
    """Replicates the model on every rank; the engine averages the gradients of the adapters."""

    name = "ddp"
    supports = Capabilities(meta_offload=True)
    uses_ddp = True

    def roundtrip(self, weight: Tensor) -> Tensor:
        """Return `weight` as rank 0 broadcasts it, because replicas are loaded so. Collective."""
        received = weight if self.comm.is_main else torch.zeros_like(weight)
        self.comm.broadcast(received, 0)
        return received
