"""Let decoder layers add and norm their residual stream in one kernel.

A layer of Llama and its relatives computes

    h = x + attention(norm(x))
    y = h + mlp(norm(h))

and its backward pass adds the gradients of the stream and of a norm, twice. With the kernels of
`nn.rms_norm`, only the last sum is left, which the fused MLP adds in a product. A probe with simple
modules tells whether a layer computes the two lines above.

A layer gets a subclass of its class, as FSDP2 does it, and not only another `forward`: transformers
checkpoints activations in `forward` of the class, or in `__call__`, depending on its release.
"""

import functools
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from hqqtrain.compat import has_hooks
from hqqtrain.models.families.structure import find_decoder_layers
from hqqtrain.nn.lora_blocks import adds_residual
from hqqtrain.nn.rms_norm import is_computable, residual_and_norm
from hqqtrain_kernels.norm_params import NormParams

_NORMS = ("input_layernorm", "post_attention_layernorm")
_MODULES = ("self_attn", "mlp")
"""The children of such a layer, with its norms."""


def fuse_layers(
    model: nn.Module, norms: Mapping[nn.Module, NormParams], undo: ExitStack | None = None
) -> int:
    """Let decoder layers that compute the two lines use the kernels; return how many do.

    Args:
        model: A causal language model, as the strategy has wrapped it.
        norms: Its norms that have a kernel.
        undo: Takes the changes back when it is closed; None: they stay.
    """
    fused = 0
    verdicts: dict[type, bool] = {}
    for layer in find_decoder_layers(model) or ():
        parts: dict[str, nn.Module] = dict(layer.named_children())
        kind: Any = type(layer)
        both = [norms.get(parts.get(name, layer)) for name in _NORMS]
        if set(parts) != {*_NORMS, *_MODULES} or None in both or "forward" in vars(layer):
            continue
        if kind not in verdicts:
            verdicts[kind] = _has_two_residuals(layer)
        if verdicts[kind]:
            if undo is not None:
                undo.callback(setattr, layer, "__class__", kind)
            layer.__class__ = _fused_class(kind, *both)
            fused += 1
    return fused


@functools.cache
def _fused_class(kind: Any, first: NormParams, second: NormParams) -> type:
    """Return a subclass of a class of decoder layers, with the same name and another `forward`."""

    def forward(layer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        norms = layer.input_layernorm, layer.post_attention_layernorm
        computable = all(is_computable(hidden_states, norm.weight) for norm in norms)
        if args or not computable or any(map(has_hooks, norms)):
            return kind.forward(layer, hidden_states, *args, **kwargs)
        return _fused_forward(layer, first, second, hidden_states, **kwargs)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def _fused_forward(
    layer: Any, first: NormParams, second: NormParams, hidden_states: Tensor, **kwargs: Any
) -> Tensor:
    """Compute the output of a decoder layer from `hidden_states` [sequences, tokens, hidden_size].

    The keyword arguments are those of its attention.
    """
    weights = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
    residual, normed = residual_and_norm(hidden_states, None, weights[0], first)
    output, _ = layer.self_attn(hidden_states=normed, **kwargs)
    if output.dtype != residual.dtype:  # autocast, with a residual stream in fp32
        residual, output = residual + output, None
    residual, normed = residual_and_norm(residual, output, weights[1], second)
    if adds_residual(layer.mlp, residual):
        return layer.mlp(normed, residual=residual)
    return residual + layer.mlp(normed)


class _Times(nn.Module):
    """Stands for a part of a layer in the probe: it multiplies by a number."""

    def __init__(self, factor: float, *, is_attention: bool = False) -> None:
        super().__init__()
        self._factor, self._is_attention = factor, is_attention

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        output = hidden_states * self._factor
        return (output, None) if self._is_attention else output


@torch.no_grad()
def _has_two_residuals(layer: Any) -> bool:
    """Whether the code of `layer` computes the two lines, with numbers in place of its parts."""
    kind = type(layer)
    stand_ins = {
        "input_layernorm": _Times(2.0), "self_attn": _Times(3.0, is_attention=True),
        "post_attention_layernorm": _Times(5.0), "mlp": _Times(7.0),
    }  # fmt: skip
    twin = object.__new__(kind)  # `copy.copy` of a module of FSDP2 would call its constructor
    vars(twin).update(vars(layer) | {"_modules": stand_ins, "training": False})
    x = torch.tensor([[[1.0, -2.0]]])
    try:
        found = kind.forward(twin, x)
    except (TypeError, ValueError, RuntimeError, AttributeError):  # it needs more than a tensor
        return False
    h = x + 3.0 * 2.0 * x
    return isinstance(found, Tensor) and torch.equal(found, h + 7.0 * 5.0 * h)
