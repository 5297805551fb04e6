"""Which weights of a language model are kept in host memory, and in which groups they are copied.

A decoder layer is a group: it is large enough for the bus, and two of them are a small part of a
model.
"""

import logging
from collections.abc import Iterator

import torch
from torch import nn

from hqqtrain.models.families.structure import decoder_layers, find_decoder_layers
from hqqtrain.models.fqn import is_adapter
from hqqtrain.nn import offload
from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain.nn.staging import StagedTensors

logger = logging.getLogger(__name__)


def meta_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the scale and zero of every quantized linear of `model`."""
    linears = (module for module in model.modules() if isinstance(module, HQQLinear))
    return [linear.get_parameter(name) for linear in linears for name in offload.META]


def layer_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of the decoder layers of `model` that are not those of adapters.

    Raises:
        UserError: The model has no stack of decoder layers.
    """
    named = decoder_layers(model).named_parameters()
    return [param for name, param in named if not is_adapter(name)]


def offload_meta(model: nn.Module) -> None:
    """Keep the scale and zero of all quantized linears in host memory, in place.

    Linears outside of the decoder layers, such as an output head, form a group each. Without a GPU
    nothing changes, and the log says so.

    Args:
        model: A model with quantized linears, on any device. On a GPU it computes the same bits as
            before, and may be trained, but not compiled.
    """
    if not (torch.cuda.is_available() or StagedTensors.copies_on_cpu):
        logger.warning("offload_meta=true: has no effect on a CPU")
        return
    groups = list(_groups(model))
    for device in {group[0].W_q.device for group in groups}:  # each GPU has its own order of use
        offload.offload_meta(group for group in groups if group[0].W_q.device == device)


def offloads_meta(model: nn.Module) -> bool:
    """Whether `offload_meta` has been called."""
    return any(isinstance(m, HQQLinear) and m.fetch_meta is not None for m in model.modules())


def offload_decoder_layers(model: nn.Module, device: torch.device) -> None:
    """Let the weights of decoder layers that are in host memory be on `device` while a layer runs.

    Args:
        model: A loaded model that is only run forward. The weights that `layer_parameters` returns
            are in host memory, and all others on `device`.
        device: Where the model computes.
    """
    offload.offload_modules(decoder_layers(model), device)


def has_host_weights(model: nn.Module) -> bool:
    """Whether a model computes on another device than the CPU and has weights in host memory."""
    types = {param.device.type for param in model.parameters()}
    return "cpu" in types and len(types) > 1


def _groups(model: nn.Module) -> Iterator[list[HQQLinear]]:
    """Yield the quantized linears of each decoder layer, and then each of the others."""
    layers, grouped = find_decoder_layers(model) or (), set[HQQLinear]()
    for layer in layers:
        if linears := [m for m in layer.modules() if isinstance(m, HQQLinear)]:
            grouped.update(linears)
            yield linears
    for module in model.modules():
        if isinstance(module, HQQLinear) and module not in grouped:
            yield [module]
