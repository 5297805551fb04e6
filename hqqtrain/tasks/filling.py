"""Turn a model on the meta device, sharded or not, into a real one.

This is the place that knows both the model (its tensors by name, ties, buffers) and the loader,
which knows only layers and tensors.
"""

from collections.abc import Callable

import torch
from torch import nn

from hqqtrain.dist import Filled, Processes, fill, materialise
from hqqtrain.dist.ahead import Reader
from hqqtrain.models import base_tensors, is_packed, restore_buffers, tie
from hqqtrain.nn import HQQLinear


def fill_model(
    model: nn.Module,
    reader: Reader,
    processes: Processes,
    *,
    quantized: bool = False,
    offload: bool = False,
    on_rows: Callable[[str, str, int, torch.Tensor], object] = lambda *_: None,
    on_layer: Callable[[str], object] = lambda _: None,
) -> Filled:
    """Allocate `model` on the device of `processes` and load its weights from `reader`. Collective.

    The arguments are those of `dist.fill` and `materialise`. Adapters get memory but no values.
    """
    materialise(model, processes.device, offload=offload)
    layers, dense = by_name(model)
    filled = fill(
        layers, dense, reader, processes, quantized=quantized, on_rows=on_rows, on_layer=on_layer
    )
    tie(model)
    restore_buffers(model, processes.device)
    return filled


def by_name(model: nn.Module) -> tuple[dict[str, HQQLinear], dict[str, torch.Tensor]]:
    """Return (quantized linears, full-precision tensors), each by its name in the checkpoint."""
    layers, dense = {}, {}
    for name, module, leaf, tensor in base_tensors(model):
        if is_packed(module, leaf):
            layers[name.removesuffix(f".{leaf}")] = module
        else:
            dense[name] = tensor
    return layers, dense
