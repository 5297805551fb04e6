"""Names: from a module as it is now (adapted, sharded, quantized) to its tensor on disk.

Wrappers put themselves into parameter names; a checkpoint knows nothing of them.
"""

from collections.abc import Iterator
from typing import TypeGuard

import torch
from torch import nn
from transformers import PreTrainedModel

from hqqtrain.nn.hqq_linear import PACKED_PARAMETERS, HQQLinear

_WRAPPERS = {"base_layer", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside whatever wraps it (PEFT, DDP, torch.compile)."""
    return next(m for m in model.modules() if isinstance(m, PreTrainedModel))


def strip_wrappers(name: str) -> str:
    """`name` of a module or parameter below the transformers model, without wrappers."""
    name = name.removeprefix("base_model.model.")
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an adapter, which no base checkpoint holds."""
    return any(part.startswith("lora_") for part in name.split("."))


def peft_key(name: str) -> str:
    """An adapter's parameter as PEFT saves it: without wrappers, nor the adapter's own name."""
    return ".".join(p for p in name.split(".") if p not in _WRAPPERS and p != "default")


def is_packed(module: nn.Module, leaf: str) -> TypeGuard[HQQLinear]:
    """Whether attribute `leaf` of `module` is a part of a packed weight."""
    return isinstance(module, HQQLinear) and leaf in PACKED_PARAMETERS


def tied_names(model: nn.Module) -> dict[str, str]:
    """Parameter name -> name of the parameter that it is tied to, as in the checkpoint."""
    return dict(base_model(model).all_tied_weights_keys)


def base_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, torch.Tensor]]:
    """(name on disk, module, attribute, tensor) of all that a checkpoint of `model` holds.

    Parameters and persistent buffers of the base: no adapters, and tied parameters once.
    HQQLinear shows W_q, scale, zero (and bias), as in a quantized checkpoint.
    """
    root = base_model(model)
    tied = tied_names(root)
    for path, module in root.named_modules():
        persistent = module._buffers.keys() - module._non_persistent_buffers_set
        buffers = {k: module._buffers[k] for k in sorted(persistent)}
        for leaf, tensor in {**module._parameters, **buffers}.items():
            name = f"{path}.{leaf}" if path else leaf
            if tensor is not None and not is_adapter(name) and strip_wrappers(name) not in tied:
                yield strip_wrappers(name), module, leaf, tensor


def expected_shapes(model: nn.Module, *, packed: bool = False) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that filling `model` needs from a checkpoint.

    Of a dense checkpoint: an HQQLinear stands for its `weight` [out_features, in_features].
    `packed=True`, of a quantized one: its W_q (uint8 bytes), scale and zero.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module, leaf, tensor in base_tensors(model):
        if is_packed(module, leaf):
            name, shape = _packed(name, leaf, module) if packed else _dense(name, leaf, module)
            shapes[name] = shape
        else:
            shapes[name] = tuple(tensor.shape)
    return shapes


def _packed(name: str, leaf: str, module: HQQLinear) -> tuple[str, tuple[int, ...]]:
    layout = module.layout
    return name, (layout.units, layout.row_bytes if leaf == "W_q" else layout.groups)


def _dense(name: str, leaf: str, module: HQQLinear) -> tuple[str, tuple[int, ...]]:
    shape = (module.layout.out_features, module.layout.in_features)
    return f"{name.removesuffix(leaf)}weight", shape


def retie_weights(model: nn.Module) -> None:
    """Make tied parameters one again; a tied linear that was quantized has weights of its own."""
    root = base_model(model)
    for target, source in tied_names(root).items():
        path, _, leaf = target.rpartition(".")
        module = root.get_submodule(path)
        if leaf in module._parameters:
            module._parameters[leaf] = root.get_parameter(source)
