"""Activation checkpointing: a decoder layer keeps only its input and recomputes the rest.

Any n layers that recompute save the same memory once they have run, but the first n are the best
choice. The peak is at the start of the backward pass, which begins with the last layer: if that
one recomputes, it needs its activations again at that moment, and nothing is saved. When the
backward pass reaches the first layers, the activations of all others have been freed.
"""

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from hqqtrain.compat import (
    CHECKPOINT_ATTRIBUTES,
    lets_inputs_require_grads,
    replace_checkpoint_function,
)
from hqqtrain.models.fqn import base_model
from hqqtrain.nn.recomputation import checkpoint_contexts
from hqqtrain.nn.replacement import restore_attribute
from hqqtrain.training.offloaded_inputs import OffloadedInputs


def recompute_first(layers: Sequence[Any], number: int) -> None:
    """Let the first `number` of `layers` recompute, and the others keep their activations.

    Args:
        layers: From `checkpointed_layers`, after `apply_activation_checkpointing`.
        number: May be changed between two forward passes.
    """
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index < number


def apply_activation_checkpointing(
    model: nn.Module,
    undo: ExitStack | None = None,
    *,
    offload: bool,
    frees_parameters: bool = False,
) -> None:
    """Make every decoder layer of `model` recompute its activations in the backward pass.

    Args:
        model: A causal language model, wrapped by PEFT or not; changed in place.
        undo: Takes the changes back when it is closed; None: they stay.
        offload: Whether to keep the inputs of decoder layers in pinned host memory. Has no effect
            on a CPU.
        frees_parameters: Whether parameters are empty between their uses, as under ZeRO-3. If so,
            PyTorch's determinism check is off: it would report their changing shapes as an error.
    """
    base = base_model(model)
    _keep_settings(base, undo)
    options: dict[str, Any] = {"use_reentrant": False, "context_fn": checkpoint_contexts}
    if frees_parameters:
        options["determinism_check"] = "none"
    with warnings.catch_warnings():
        # Newer releases of transformers have another name for this method and deprecate this one,
        # but older releases lack the new name.
        warnings.simplefilter("ignore", FutureWarning)
        base.gradient_checkpointing_enable(options)
    # transformers lets the output of the embeddings require gradients. Some models, such as GIT,
    # add to it in place, which PyTorch refuses for a tensor that no operation has computed.
    base.disable_input_require_grads()
    hook = base.get_input_embeddings().register_forward_hook(_require_grad)
    if undo is not None:
        undo.callback(hook.remove)
    if not offload:
        return
    replaced = replace_checkpoint_function(base, partial(_offloaded, OffloadedInputs(), options))
    assert replaced, "this version of transformers keeps the checkpoint function elsewhere"


def _keep_settings(base: PreTrainedModel, undo: ExitStack | None) -> None:
    """Let `undo` restore the activation checkpointing that transformers was asked for."""
    if undo is not None and lets_inputs_require_grads(base):
        base.disable_input_require_grads()
        undo.callback(base.enable_input_require_grads)
    for module in base.modules():
        for name in CHECKPOINT_ATTRIBUTES:
            restore_attribute(module, name, undo)


def _require_grad(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """Return a copy of the output that requires gradients and may be changed in place."""
    return output.requires_grad_(True).clone()


def _offloaded(host: OffloadedInputs, options: dict[str, Any], function: Any, *inputs: Any) -> Any:
    """Checkpoint `function` and offload its inputs to `host`.

    `checkpoint` saves the inputs, to which these hooks apply. Inside `function`, the hooks of
    `checkpoint` replace these, so nothing else is offloaded.
    """
    with saved_tensors_hooks(host.pack, host.unpack):
        return checkpoint(function, *inputs, **options)
