"""FSDP1 for frozen packed weights: every decoder layer is one flat tensor, sharded evenly.

Trained parameters stay whole on every rank and DDP averages their gradients, because FSDP1 would
gather thousands of small adapters one by one. Embeddings and head stay whole, too. FSDP2 keeps them
unsharded from the first step on, so this takes no more memory.
"""

import logging

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from hqqtrain.common.errors import UserError
from hqqtrain.config.conflicts import Conflict
from hqqtrain.distributed.strategies.base import (
    Supports,
    ensure_process_group,
    probe_layer,
    storage_dtype_name,
)
from hqqtrain.distributed.strategies.row_sharding import FlatStrategy, unshard, view_packed_as
from hqqtrain.models.families.structure import decoder_layers, describe_decoder_layers
from hqqtrain.models.fqn import base_model
from hqqtrain.nn.hqq_linear import PACKED_PARAMETERS

logger = logging.getLogger(__name__)


class FSDP1(FlatStrategy):
    """Shards the frozen parameters of decoder layers and replicates all others."""

    name = "fsdp1"
    supports = Supports(
        conflicts=(
            Conflict(
                {"quant.storage_dtype": ("uint8",)},
                "parallel.strategy=fsdp1 flattens a decoder layer to one tensor of the compute "
                "dtype; use auto (the same bits, viewed), or fsdp2.",
            ),
        )
    )
    wraps_ddp = True

    def check_model(self, model: nn.Module) -> None:
        """Check that the frozen parameters of a decoder layer have, or can be viewed as, one dtype.

        Raises:
            UserError: They cannot; the message names the parameter and the keys to change.
        """
        super().check_model(model)
        in_layers = set(decoder_layers(model).parameters())
        for name, param in model.named_parameters():
            is_packed = name.rpartition(".")[2] in PACKED_PARAMETERS
            if param not in in_layers or is_packed or param.requires_grad:
                continue
            if param.dtype != self.storage_dtype:
                raise UserError(
                    f"quant.storage_dtype={storage_dtype_name(self.storage_dtype)}: {name} is "
                    f"{param.dtype}, and parallel.strategy=fsdp1 flattens a decoder layer to one "
                    f"tensor; use quant.storage_dtype={storage_dtype_name(param.dtype)}, or fsdp2."
                )

    def _smaller_storage(self) -> str:
        return ""  # the storage dtype is the compute dtype

    def wrap(self, model: nn.Module) -> nn.Module:
        """Wrap every decoder layer of `model`, and its base model, in FSDP1. Collective.

        Packed weights become views of `storage_dtype`. Only one layer at a time is whole on a rank.

        Args:
            model: Sharded by rows and loaded; changed in place if adapters surround a base model.
        """
        base = base_model(model)
        name = next(name for name, module in model.named_modules() if module is base)
        wrapped = self._wrap_layers(base)
        if not name:
            return wrapped
        model.set_submodule(name, wrapped)
        return model

    def _wrap_layers(self, base: nn.Module) -> nn.Module:
        layers = decoder_layers(base)
        logger.info("fsdp1: decoder layers: %s", describe_decoder_layers(base))
        for number, layer in enumerate(layers):
            unshard(layer)
            view_packed_as(layer, self.storage_dtype)
            layers[number] = self._wrap_module(layer, _trained(layer))
        unshard(base)
        # The root wrapper owns no parameters; FSDP1 needs a root to prefetch layers.
        sharded = {p for p in layers.parameters() if not p.requires_grad}
        return self._wrap_module(base, [p for p in base.parameters() if p not in sharded])

    def _wrap_module(self, module: nn.Module, ignored: list[nn.Parameter]) -> nn.Module:
        # accelerate's CPU device has an index (cpu:0), which FSDP1 treats as a different device.
        device = self.comm.device
        device = torch.device("cpu") if device.type == "cpu" else device
        # With use_orig_params, parameters keep their names and start at multiples of 16 bytes.
        return FullyShardedDataParallel(
            module, ignored_states=ignored, use_orig_params=True, device_id=device
        )

    def roundtrip(self, weight: Tensor) -> Tensor:
        """Return `weight` after FSDP1 has flattened, sharded and gathered it. Collective."""
        ensure_process_group(self.comm.size)
        module = probe_layer(weight)
        wrapped = self._wrap_module(module, _trained(module))
        with FullyShardedDataParallel.summon_full_params(wrapped, writeback=False):
            return module.get_parameter("W_q").detach().clone()


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]
