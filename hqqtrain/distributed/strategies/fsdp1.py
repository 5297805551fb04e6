"""FSDP1 for frozen packed weights: every decoder layer is one flat tensor, sharded evenly.

Trained parameters are replicated and DDP averages their gradients, because FSDP1 would gather
thousands of small adapters one by one. Embeddings and head are replicated, too. Their replication
costs no extra peak memory: FSDP2 gathers them in the first step and does not reshard them.
"""

import logging

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from hqqtrain.common.errors import UserError
from hqqtrain.config.conflicts import Conflict
from hqqtrain.distributed.strategies.base import (
    Capabilities,
    ensure_process_group,
    probe_layer,
    storage_dtype_name,
)
from hqqtrain.distributed.strategies.row_sharding import FlatStrategy, unshard_rows, view_packed_as
from hqqtrain.models.families.structure import decoder_layers, describe_decoder_layers
from hqqtrain.models.fqn import base_model
from hqqtrain.nn.hqq_linear import PACKED_PARAMETERS

logger = logging.getLogger(__name__)


class FSDP1(FlatStrategy):
    """Shards the frozen parameters of decoder layers and replicates all others."""

    name = "fsdp1"
    supports = Capabilities(
        conflicts=(
            Conflict(
                {"quant.storage_dtype": ("uint8",)},
                "parallel.strategy=fsdp1 flattens a decoder layer to one tensor, so W_q must be "
                "viewed as the compute dtype; use auto, which views the same bits, or "
                "parallel.strategy=fsdp2.",
            ),
        )
    )
    uses_ddp = True

    def check_model(self, model: nn.Module) -> None:
        """Check that one flat tensor can hold all frozen parameters of a decoder layer.

        Packed weights can be viewed as the dtype of that tensor; all others must have it already.

        Raises:
            UserError: A parameter has another dtype. The message names it and the keys to change.
        """
        super().check_model(model)
        layer_params = set(decoder_layers(model).parameters())
        for name, param in model.named_parameters():
            is_packed = name.rpartition(".")[2] in PACKED_PARAMETERS
            if param not in layer_params or is_packed or param.requires_grad:
                continue
            if param.dtype != self.storage_dtype:
                raise UserError(
                    f"quant.storage_dtype={storage_dtype_name(self.storage_dtype)}: {name} is "
                    f"{param.dtype}, but parallel.strategy=fsdp1 flattens a decoder layer to one "
                    "tensor of one dtype; use quant.storage_dtype="
                    f"{storage_dtype_name(param.dtype)}, or parallel.strategy=fsdp2."
                )

    def _smaller_storage_advice(self) -> str:
        return ""  # FSDP1 cannot use a smaller dtype: the storage dtype is the compute dtype

    def wrap(self, model: nn.Module) -> nn.Module:
        """Wrap every decoder layer of `model`, and its base model, in FSDP1. Collective.

        Packed weights become views of `storage_dtype`. A rank holds one full layer at a time.

        Args:
            model: Sharded by rows and loaded. Its decoder layers are replaced in place.

        Returns:
            The wrapped base model; with adapters, `model`, whose base model is now wrapped.
        """
        base = base_model(model)
        base_name = next(name for name, module in model.named_modules() if module is base)
        wrapped = self._wrap_layers(base)
        if not base_name:  # `model` is the base model itself
            return wrapped
        model.set_submodule(base_name, wrapped)
        return model

    def _wrap_layers(self, base: nn.Module) -> nn.Module:
        layers = decoder_layers(base)
        logger.info("fsdp1: decoder layers: %s", describe_decoder_layers(base))
        # Layer by layer: gather from row shards, view as floats, shard flat, free the full layer.
        for number, layer in enumerate(layers):
            unshard_rows(layer)
            view_packed_as(layer, self.storage_dtype)
            layers[number] = self._wrap_module(layer, ignored=_trained(layer))
        # Then gather what is outside the layers: embeddings, head, final norm. They stay full.
        unshard_rows(base)
        # The root wrapper ignores every parameter that the layers do not own already, so it owns
        # none; FSDP1 needs a root to prefetch layers.
        sharded = {p for p in layers.parameters() if not p.requires_grad}
        return self._wrap_module(base, ignored=[p for p in base.parameters() if p not in sharded])

    def _wrap_module(self, module: nn.Module, *, ignored: list[nn.Parameter]) -> nn.Module:
        # accelerate's CPU device has an index (cpu:0), which FSDP1 treats as a different device.
        device = self.comm.device
        device = torch.device("cpu") if device.type == "cpu" else device
        # With use_orig_params, parameters keep their names. FSDP1 then also aligns each of them to
        # 16 bytes in the flat tensor, which the kernels need: they load W_q 16 bytes at a time.
        return FullyShardedDataParallel(
            module, ignored_states=ignored, use_orig_params=True, device_id=device
        )

    def roundtrip(self, weight: Tensor) -> Tensor:
        """Return `weight` after FSDP1 has flattened, sharded and gathered it. Collective."""
        ensure_process_group(self.comm.size)
        module = probe_layer(weight)
        wrapped = self._wrap_module(module, ignored=_trained(module))
        with FullyShardedDataParallel.summon_full_params(wrapped, writeback=False):
            return module.get_parameter("W_q").detach().clone()


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]
