"""FSDP1 for frozen packed weights: every decoder layer is one flat tensor, cut evenly.

What is trained stays whole on every rank, where DDP averages its gradients: FSDP1 would gather
each of some thousand small adapters by itself. Embeddings and head stay whole, too, as FSDP2 keeps
them from the first step on.
"""

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from hqqtrain.dist.spread import hold_as, make_whole
from hqqtrain.dist.strategy import decoder_layers


def wrap_layers(model: nn.Module, storage: torch.dtype, device: torch.device) -> nn.Module:
    """`model`, spread and filled, its decoder layers and itself wrapped. Collective.

    Packed weights are held as `storage`, and whole for a layer at a time.
    """
    layers = decoder_layers(model)
    for number, layer in enumerate(layers):
        make_whole(layer)
        hold_as(layer, storage)
        layers[number] = _wrap(layer, [p for p in layer.parameters() if p.requires_grad], device)
    make_whole(model)
    # Nothing is left to this one but to be the root that the layers' prefetching needs.
    sharded = {p for p in layers.parameters() if not p.requires_grad}
    return _wrap(model, [p for p in model.parameters() if p not in sharded], device)


def gathered(module: nn.Module, leaf: str, device: torch.device) -> Tensor:
    """Parameter `leaf` of `module` after it was cut and gathered. Collective."""
    wrapped = _wrap(module, [p for p in module.parameters() if p.requires_grad], device)
    with FullyShardedDataParallel.summon_full_params(wrapped, writeback=False):
        return module.get_parameter(leaf).detach().clone()


def _wrap(module: nn.Module, whole: list[nn.Parameter], device: torch.device) -> nn.Module:
    # accelerate numbers a CPU, which FSDP1 takes for another device.
    device = torch.device("cpu") if device.type == "cpu" else device
    # use_orig_params: parameters keep their names, and begin at multiples of 16 bytes.
    return FullyShardedDataParallel(
        module, ignored_states=whole, use_orig_params=True, device_id=device
    )
