"""Give a meta model the tensors that stay in full precision, read one at a time."""

from collections.abc import Callable

import torch
from torch import nn

from hqqtrain.models.build import restore_buffers
from hqqtrain.models.names import base_tensors, is_packed, tie
from hqqtrain.models.reader import CheckpointReader

Progress = Callable[[str, int], None]
"""Called with the name of a tensor and its bytes, after it was read."""


def fill_dense(
    model: nn.Module,
    reader: CheckpointReader,
    *,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    on_progress: Progress | None = None,
) -> None:
    """Read every unquantized tensor of `model` that is on meta; restore buffers, tie.

    Floats become `dtype` (None: as on disk). Packed weights of HQQLinear and adapters are left
    alone. Not for sharded models: each tensor is read whole. Check names and shapes before,
    with `reader.check(expected_shapes(model))`.
    """
    for name, module, leaf, old in list(base_tensors(model)):
        if not old.is_meta or is_packed(module, leaf):
            continue
        tensor = reader.read(name)
        if on_progress:
            on_progress(name, tensor.nbytes)
        place(module, leaf, tensor.to(device, dtype if tensor.is_floating_point() else None))
    tie(model)
    restore_buffers(model, device)


def place(module: nn.Module, leaf: str, tensor: torch.Tensor) -> None:
    """Put `tensor` where the parameter or buffer `leaf` of `module` was."""
    old = module._parameters.get(leaf)
    if old is None:
        module._buffers[leaf] = tensor
    else:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=old.requires_grad)
