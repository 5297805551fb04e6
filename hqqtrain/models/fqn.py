"""Map the parameters of a wrapped model to the names of its tensors on disk.

PEFT, FSDP and other wrappers add parts to the fully qualified names (FQNs) of parameters. The names
in a checkpoint do not contain these parts.
"""

from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch import nn
from transformers import PreTrainedModel

from hqqtrain.compat import WRAPPER_NAMES, persistent_buffers
from hqqtrain.nn.hqq_linear import PACKED_PARAMETERS, HQQLinear

_WRAPPERS = {"base_layer", "original_module", "token_adapter", *WRAPPER_NAMES}
"""Parts of FQNs that PEFT, torch.compile, activation checkpointing and FSDP add."""

_COPIES = ("modules_to_save", "trainable_tokens_delta", "trainable_tokens_original")
"""Parts of the FQNs of what PEFT trains beside LoRA: copies of modules and of embeddings."""

_ADAPTER_PARTS = {"default", "base_layer", "modules_to_save", *WRAPPER_NAMES}
"""Parts of FQNs that PEFT leaves out when it saves an adapter."""


def base_model(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside its wrappers (PEFT, DDP, torch.compile)."""
    return next(m for m in model.modules() if isinstance(m, PreTrainedModel))


def strip_wrappers(name: str) -> str:
    """Return the FQN of a module or parameter within the transformers model, without wrappers."""
    name = name.removeprefix("base_model.model.")
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter, and so not to a base checkpoint."""
    return any(part.startswith("lora_") or part in _COPIES for part in name.split("."))


def peft_key(name: str) -> str:
    """Return the name under which PEFT saves an adapter's parameter.

    The name contains neither wrappers nor PEFT's name of the adapter, `default`.
    """
    return ".".join(part for part in name.split(".") if part not in _ADAPTER_PARTS)


def original_module(module: Any) -> Any:
    """Return the module of the base inside the wrapper with which PEFT trains a copy of it."""
    return getattr(module, "original_module", module)


def is_packed(module: nn.Module, attribute: str) -> TypeGuard[HQQLinear]:
    """Whether `attribute` of `module` is the W_q, scale or zero of a packed weight."""
    return isinstance(module, HQQLinear) and attribute in PACKED_PARAMETERS


def tied_names(model: nn.Module) -> dict[str, str]:
    """Return name of a tied parameter -> name of the parameter that the checkpoint has for it."""
    return dict(base_model(model).all_tied_weights_keys)


def base_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, torch.Tensor]]:
    """Iterate over the parameters and persistent buffers of the base model.

    These are the tensors of a checkpoint of `model`: without adapters, and with tied parameters
    once. An HQQLinear has W_q, scale, zero and perhaps bias, as in a quantized checkpoint.

    Yields:
        Name on disk, module, name of the module's attribute, and tensor.
    """
    root = base_model(model)
    tied = tied_names(root)
    for path, module in root.named_modules():
        params = module.named_parameters(recurse=False, remove_duplicate=False)
        for attribute, tensor in (*params, *sorted(persistent_buffers(module).items())):
            name = f"{path}.{attribute}" if path else attribute
            if not is_adapter(name) and strip_wrappers(name) not in tied:
                yield strip_wrappers(name), module, attribute, tensor


def expected_shapes(model: nn.Module, *, packed: bool = False) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor that loading `model` reads from a checkpoint.

    In a dense checkpoint (`packed=False`) an HQQLinear corresponds to its `weight`
    [out_features, in_features]; in a quantized one (`packed=True`) to W_q (uint8 bytes), scale and
    zero.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module, attribute, tensor in base_tensors(model):
        if not is_packed(module, attribute):
            shapes[name] = tuple(tensor.shape)
            continue
        layout = module.layout
        if packed:
            columns = layout.unit_bytes if attribute == "W_q" else layout.groups
            shapes[name] = (layout.units, columns)
        else:
            # W_q, scale and zero map to the same entry.
            dense_name = f"{name.removesuffix(attribute)}weight"
            shapes[dense_name] = (layout.out_features, layout.in_features)
    return shapes


def retie_weights(model: nn.Module) -> None:
    """Tie the parameters of `model` again, except those of linears that were quantized."""
    root = base_model(model)
    for target, source in tied_names(root).items():
        path, _, attribute = target.rpartition(".")
        module = original_module(root.get_submodule(path))
        # A quantized linear has no parameter `weight` that could be tied.
        if isinstance(getattr(module, attribute, None), nn.Parameter):
            path, _, source_attribute = source.rpartition(".")
            tied_to = original_module(root.get_submodule(path))
            setattr(module, attribute, getattr(tied_to, source_attribute))


def untie_weight(model: PreTrainedModel, name: str) -> None:
    """Give the tied parameter `name` of `model`, which is on the meta device, values of its own.

    A quantized linear has no parameter to untie; it reads its own weight from then on.
    """
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    param = getattr(module, attribute, None)
    if isinstance(param, nn.Parameter):
        setattr(module, attribute, nn.Parameter(torch.empty_like(param), param.requires_grad))
    del model.all_tied_weights_keys[name]
