"""DDP: every rank has the whole model, and gradients of the adapters are averaged."""

import torch
from torch import Tensor

from hqqtrain.distributed.strategies.base import Strategy


class DDP(Strategy):
    """Replicates the model; the engine averages the gradients."""

    name = "ddp"
    wraps_ddp = True

    def roundtrip(self, weight: Tensor) -> Tensor:
        """Return `weight` as rank 0 broadcasts it, which is how replicas are loaded. Collective."""
        received = weight if self.comm.is_main else torch.zeros_like(weight)
        self.comm.broadcast(received, 0)
        return received
