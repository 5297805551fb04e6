"""The strategies under which every process has the full model: a single process, and DDP."""

import torch
from torch import Tensor

from hqqtrain.distributed.strategies.base import Capabilities, Strategy


class SingleProcess(Strategy):
    """No parallelism: the model stays as it is."""

    name = "single"
    supports = Capabilities(several_processes=False)


class DDP(Strategy):
    """Replicates the model on every rank; the engine averages the gradients of the adapters."""

    name = "ddp"
    uses_ddp = True

    def roundtrip(self, weight: Tensor) -> Tensor:
        """Return `weight` as rank 0 broadcasts it, because replicas are loaded so. Collective."""
        received = weight if self.comm.is_main else torch.zeros_like(weight)
        self.comm.broadcast(received, 0)
        return received
