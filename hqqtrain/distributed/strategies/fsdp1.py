"""FSDP1 for frozen packed weights: every decoder layer is one flat tensor, sharded evenly.

Trained parameters stay whole on every rank and DDP averages their gradients, because FSDP1 would
gather thousands of small adapters one by one. Embeddings and head stay whole, too. FSDP2 keeps them
unsharded from the first step on, so this takes no more memory.
"""

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from hqqtrain.distributed.strategies.row_sharding import unshard, view_packed_as
from hqqtrain.models.families.structure import decoder_layers


def apply_fsdp1(model: nn.Module, storage: torch.dtype, device: torch.device) -> nn.Module:
    """Wrap every decoder layer of `model`, and `model` itself, in FSDP1. Collective.

    Packed weights become views of `storage`. Only one layer at a time is whole on a rank.

    Args:
        model: Sharded by rows (`spread`) and loaded.
        storage: One dtype for all frozen parameters of a layer, which FSDP1 flattens.
        device: Device of this rank.

    Returns:
        The wrapped model.
    """
    layers = decoder_layers(model)
    for number, layer in enumerate(layers):
        unshard(layer)
        view_packed_as(layer, storage)
        layers[number] = _wrap(layer, [p for p in layer.parameters() if p.requires_grad], device)
    unshard(model)
    # The root wrapper owns no parameters; FSDP1 needs a root to prefetch layers.
    sharded = {p for p in layers.parameters() if not p.requires_grad}
    return _wrap(model, [p for p in model.parameters() if p not in sharded], device)


def roundtrip_fsdp1(module: nn.Module, leaf: str, device: torch.device) -> Tensor:
    """Return a copy of parameter `leaf` of `module` after sharding and gathering. Collective."""
    wrapped = _wrap(module, [p for p in module.parameters() if p.requires_grad], device)
    with FullyShardedDataParallel.summon_full_params(wrapped, writeback=False):
        return module.get_parameter(leaf).detach().clone()


def _wrap(module: nn.Module, ignored: list[nn.Parameter], device: torch.device) -> nn.Module:
    # accelerate's CPU device has an index (cpu:0), which FSDP1 treats as a different device.
    device = torch.device("cpu") if device.type == "cpu" else device
    # With use_orig_params, parameters keep their names and start at multiples of 16 bytes.
    return FullyShardedDataParallel(
        module, ignored_states=ignored, use_orig_params=True, device_id=device
    )
