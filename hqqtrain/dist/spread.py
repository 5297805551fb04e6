"""A model cut by rows before an engine has it: FSDP1 and ZeRO-3 take it a layer at a time.

Both cut flat memory, in the middle of rows, and want the whole of what they cut. So the model is
spread by rows first and filled like that, as under FSDP2, and handed over decoder layer by decoder
layer: each weight is quantized once in all, and no rank holds more than its share and one layer.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from hqqtrain.config import UserError
from hqqtrain.dist.strategy import decoder_layers, ensure_process_group, storage_name
from hqqtrain.nn import PACKED, HQQLinear


def spread(model: nn.Module, device: torch.device, world_size: int) -> None:
    """Cuts dimension 0 of every parameter, on meta, over all ranks; tied ones stay tied."""
    ensure_process_group(world_size)
    mesh = init_device_mesh(device.type, (world_size,))
    _replace(model, lambda p: distribute_tensor(p.detach(), mesh, [Shard(0)], src_data_rank=None))


def make_whole(module: nn.Module) -> None:
    """Every parameter of `module` that is spread is whole again, on every rank. Collective."""
    _replace(module, lambda p: p.full_tensor().detach() if isinstance(p, DTensor) else p)


def check_flat(model: nn.Module, storage: torch.dtype, strategy: str) -> None:
    """Raises UserError where packed weights cannot be held as `storage`, or, under `fsdp1`, a
    decoder layer would have frozen parameters of more than one dtype."""
    for name, module in model.named_modules():
        if isinstance(module, HQQLinear):
            _check_views(name, module, storage, strategy)
    in_layers = set(decoder_layers(model).parameters())
    for name, param in model.named_parameters() if strategy == "fsdp1" else ():
        packed = name.rpartition(".")[2] in PACKED
        if param in in_layers and not (packed or param.requires_grad or param.dtype == storage):
            raise UserError(
                f"quant.storage={storage_name(storage)}: {name} is {param.dtype}, and "
                "parallel.strategy=fsdp1 makes one tensor of a decoder layer; use "
                f"quant.storage={storage_name(param.dtype)}, or fsdp2."
            )


def _check_views(name: str, layer: HQQLinear, storage: torch.dtype, strategy: str) -> None:
    row = layer.layout.groups * layer.spec.meta_dtype.itemsize
    if row % storage.itemsize:
        bf16 = "" if strategy == "fsdp1" else "quant.storage=bf16, "  # which has no choice
        raise UserError(
            f"parallel.strategy={strategy}: a row of {name} has {layer.layout.groups} "
            f"scales of {layer.spec.meta_dtype}, {row} bytes, which cannot be held as "
            f"{storage}; use {bf16}quant.meta_dtype=fp32, or fsdp2."
        )


def hold_as(module: nn.Module, storage: torch.dtype) -> None:
    """All packed weights of `module` become views of `storage`: see `HQQLinear.hold_as`."""
    for part in module.modules():
        if isinstance(part, HQQLinear):
            part.hold_as(storage)


def _replace(module: nn.Module, changed: Callable[[nn.Parameter], Tensor]) -> None:
    """Puts `changed` of each parameter in its place, of one with several places once."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for leaf, param in part._parameters.items():
            if param is None:
                continue
            if param not in made:
                made[param] = _parameter(changed(param), param)
            part._parameters[leaf] = made[param]


def _parameter(tensor: Tensor, old: nn.Parameter) -> nn.Parameter:
    return old if tensor is old else nn.Parameter(tensor, requires_grad=old.requires_grad)
