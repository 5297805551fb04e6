"""The strategies under which every process has the whole model: a single process, and DDP."""

import torch
from torch import Tensor

from hqqtrain.distributed.strategies.base import Strategy, Supports


class SingleProcess(Strategy):
    """No parallelism: the model stays as it is."""

    name = "single"
    supports = Supports(several_processes=False)


class DDP(Strategy):
    """Replicates the model on every rank; the engine averages the gradients of the adapters."""

    name = "ddp"
    wraps_ddp = True

    def roundtrip(self, weight: Tensor) -> Tensor:
        """Return `weight` as rank 0 broadcasts it, which is how replicas are loaded. Collective."""
        received = weight if self.comm.is_main else torch.zeros_like(weight)
        self.comm.broadcast(received, 0)
        return received
