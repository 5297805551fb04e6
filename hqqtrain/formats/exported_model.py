"""Build the model that another program will compute with, from what an export has written."""

import copy
from collections.abc import Callable, Container
from typing import Any

from torch import nn

from hqqtrain.models.fqn import strip_wrappers
from hqqtrain.nn.hqq_linear import HQQLinear


def exported_model(
    model: nn.Module, read_layer: Callable[[str], nn.Module], merged: Container[str] = ()
) -> nn.Module:
    """Return a copy of `model` with the exported layers; it shares all other parameters.

    Args:
        model: The quantized model, with or without adapters, that is not sharded.
        read_layer: Returns the exported linear of a module, without a bias.
        merged: Names of the modules whose adapter is a part of their exported weight.
    """
    shared = (*model.parameters(), *model.buffers())
    exported = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    for path, layer in list(exported.named_modules()):
        if isinstance(layer, HQQLinear):
            name = strip_wrappers(path)
            place = path.removesuffix(".base_layer") if name in merged else path
            _replace(exported, place, _with_bias(read_layer(name), layer))
    return exported


def _with_bias(linear: Any, layer: HQQLinear) -> nn.Module:
    """Return an exported linear with the bias, device and dtype of our layer."""
    linear.bias = layer.bias
    return linear.to(layer.W_q.device, layer.compute_dtype).train(layer.training)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)
