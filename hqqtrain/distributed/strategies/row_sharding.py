"""Row sharding for loading, before FSDP1 or ZeRO-3 takes over the model.

Both engines shard flat memory, in the middle of rows, and need the full tensors first. So the model
is sharded by rows and loaded, as under FSDP2, and then handed over one decoder layer at a time.
Each weight is quantized by one rank only, and no rank holds more than its shard and one layer.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from hqqtrain.common.errors import UserError
from hqqtrain.distributed.strategies.base import ensure_process_group, storage_dtype_name
from hqqtrain.models.families.structure import decoder_layers
from hqqtrain.nn.hqq_linear import PACKED_PARAMETERS, HQQLinear


def shard_rows(model: nn.Module, device: torch.device, world_size: int) -> None:
    """Shard dimension 0 of every meta parameter over all ranks; tied parameters stay tied."""
    ensure_process_group(world_size)
    mesh = init_device_mesh(device.type, (world_size,))
    _replace(model, lambda p: distribute_tensor(p.detach(), mesh, [Shard(0)], src_data_rank=None))


def unshard(module: nn.Module) -> None:
    """Unshard every parameter of `module` in place, on every rank. Collective."""
    _replace(module, lambda p: p.full_tensor().detach() if isinstance(p, DTensor) else p)


def check_flat_storage(model: nn.Module, storage: torch.dtype, strategy: str) -> None:
    """Check that `strategy` (`fsdp1` or `zero3`) can flatten the parameters of `model`.

    Args:
        model: Quantized, on any device.
        storage: Dtype to view W_q, scale and zero as.
        strategy: FSDP1 also needs one dtype for all frozen parameters of a decoder layer.

    Raises:
        UserError: A packed weight cannot be viewed as `storage`, or the dtypes differ.
    """
    for name, module in model.named_modules():
        if isinstance(module, HQQLinear):
            _check_views(name, module, storage, strategy)
    in_layers = set(decoder_layers(model).parameters())
    for name, param in model.named_parameters() if strategy == "fsdp1" else ():
        packed = name.rpartition(".")[2] in PACKED_PARAMETERS
        if param in in_layers and not (packed or param.requires_grad or param.dtype == storage):
            raise UserError(
                f"quant.storage_dtype={storage_dtype_name(storage)}: {name} is {param.dtype}, and "
                "parallel.strategy=fsdp1 flattens a decoder layer to one tensor; use "
                f"quant.storage_dtype={storage_dtype_name(param.dtype)}, or fsdp2."
            )


def _check_views(name: str, layer: HQQLinear, storage: torch.dtype, strategy: str) -> None:
    row = layer.layout.groups * layer.spec.meta_dtype.itemsize
    if row % storage.itemsize:
        bf16 = (
            "" if strategy == "fsdp1" else "quant.storage_dtype=bf16, "
        )  # fsdp1's is the compute dtype
        raise UserError(
            f"parallel.strategy={strategy}: a row of {name} has {layer.layout.groups} "
            f"scales of {layer.spec.meta_dtype}, {row} bytes, which cannot be viewed as "
            f"{storage}; use {bf16}quant.meta_dtype=fp32, or fsdp2."
        )


def view_packed_as(module: nn.Module, storage: torch.dtype) -> None:
    """View all packed weights of `module` as `storage`, see `HQQLinear.hold_as`."""
    for part in module.modules():
        if isinstance(part, HQQLinear):
            part.hold_as(storage)


def _replace(module: nn.Module, convert: Callable[[nn.Parameter], Tensor]) -> None:
    """Replace each parameter by `convert(parameter)`, called once for tied parameters."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for leaf, param in part._parameters.items():
            if param is None:
                continue
            if param not in made:
                tensor = convert(param)
                if not isinstance(tensor, nn.Parameter):
                    tensor = nn.Parameter(tensor, requires_grad=param.requires_grad)
                made[param] = tensor
            part._parameters[leaf] = made[param]
