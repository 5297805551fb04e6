"""Row sharding for loading, before FSDP1 or ZeRO-3 takes over the model.

FSDP1 and ZeRO-3 split flat memory in the middle of rows, and need the full tensors to do it. The
model is therefore sharded by rows and loaded, as under FSDP2, and then handed over one decoder
layer at a time. Each row is quantized by one rank only, and no rank holds more than its shard and
one full layer.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from hqqtrain.common.errors import UserError
from hqqtrain.distributed.comm import Communicator
from hqqtrain.distributed.strategies.base import STORAGE_DTYPES, Strategy, ensure_process_group
from hqqtrain.nn.hqq_linear import HQQLinear


class FlatStrategy(Strategy):
    """Base of FSDP1 and ZeRO-3, which view W_q, scale and zero as `storage_dtype`."""

    shards_parameters = True

    @classmethod
    def resolve_storage_dtype(cls, wanted: str, compute: torch.dtype) -> torch.dtype:
        """Resolve `quant.storage_dtype`; `auto` is `compute`.

        FSDP1 flattens a layer to one tensor, so its packed weights have the dtype of the others.
        """
        return compute if wanted == "auto" else STORAGE_DTYPES[wanted]

    def check_model(self, model: nn.Module) -> None:
        """Check that the packed weights of `model` can be viewed as `storage_dtype`.

        Raises:
            UserError: A weight cannot; the message names it and the keys to change.
        """
        super().check_model(model)
        for name, module in model.named_modules():
            if isinstance(module, HQQLinear):
                self._check_views(name, module)

    def _check_views(self, name: str, layer: HQQLinear) -> None:
        scale_row_bytes = layer.layout.groups * layer.spec.meta_dtype.itemsize
        if scale_row_bytes % self.storage_dtype.itemsize:
            raise UserError(
                f"parallel.strategy={self.name}: a row of {name} has {layer.layout.groups} "
                f"scales of {layer.spec.meta_dtype}, {scale_row_bytes} bytes, which cannot be "
                f"viewed as {self.storage_dtype}; use {self._smaller_storage_advice()}"
                "quant.meta_dtype=fp32, or fsdp2."
            )

    def _smaller_storage_advice(self) -> str:
        """Return the advice to choose a smaller `quant.storage_dtype`, if that is possible."""
        return "quant.storage_dtype=bf16, "

    def shard(self, model: nn.Module) -> None:
        """Shard `model` by rows, for loading only; `wrap` hands it over. Collective."""
        shard_rows(model, self.comm)


def shard_rows(model: nn.Module, comm: Communicator) -> None:
    """Shard dimension 0 of every meta parameter over all ranks; tied parameters stay tied."""
    ensure_process_group(comm.size)
    mesh = init_device_mesh(comm.device.type, (comm.size,))
    _replace(model, lambda p: distribute_tensor(p.detach(), mesh, [Shard(0)], src_data_rank=None))


def unshard_rows(module: nn.Module) -> None:
    """Replace row shards by full parameters, in place and on every rank. Collective."""
    _replace(module, lambda p: p.full_tensor().detach() if isinstance(p, DTensor) else p)


def view_packed_as(module: nn.Module, storage: torch.dtype) -> None:
    """View all packed weights of `module` as `storage`, see `HQQLinear.view_packed_as`."""
    for submodule in module.modules():
        if isinstance(submodule, HQQLinear):
            submodule.view_packed_as(storage)


def _replace(module: nn.Module, convert: Callable[[nn.Parameter], Tensor]) -> None:
    """Replace each parameter by `convert(parameter)`, called once for tied parameters."""
    converted: dict[nn.Parameter, nn.Parameter] = {}
    for submodule in module.modules():
        # A list, because the loop replaces parameters. Without remove_duplicate=False it would
        # pass over a parameter that is tied to another one of the same module.
        for name, param in list(submodule.named_parameters(recurse=False, remove_duplicate=False)):
            if param not in converted:
                tensor = convert(param)
                if not isinstance(tensor, nn.Parameter):
                    tensor = nn.Parameter(tensor, requires_grad=param.requires_grad)
                converted[param] = tensor
            setattr(submodule, name, converted[param])
