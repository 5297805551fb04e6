"""Estimate what a micro-batch keeps for its backward pass, and what that pass adds at its peak.

The formulas count tensors as the modules save them: with the LoRA blocks of `train.fused=auto`, and
on the path of transformers and PEFT.
"""

from dataclasses import dataclass

import torch
from torch import nn

from hqqtrain.loading.workload import Workload
from hqqtrain.models.families.registry import FAMILIES, layer_names
from hqqtrain.models.families.structure import find_decoder_layers, text_config
from hqqtrain.models.fqn import base_model
from hqqtrain.nn.base_linears import BaseLinear, linear_shapes

MASK_BYTES = 5
"""Bytes for each pair of tokens of a sequence, of the attention masks that `train.fused=false` has:
what an 8B model took beyond the other tensors at 16,384 and 32,768 tokens, on an H200."""


@dataclass(frozen=True)
class LayerWidths:
    """Elements per token of the tensors in a decoder layer.

    Attributes:
        hidden: The residual stream.
        linears: Inputs and outputs of all linears, each counted for itself.
        weights: Weights of all linears; not per token.
        largest_block: Weights that a block dequantizes at a time; not per token.
        qkv: Outputs of q, k and v.
        rotated: Query and key.
        attention: Input of o.
        inner: Input of down.
        gate_up: Outputs of gate and up.
        is_known: Whether the roles of the linears are known; otherwise the last five are 0.
    """

    hidden: int
    linears: int
    weights: int
    largest_block: int
    qkv: int = 0
    rotated: int = 0
    attention: int = 0
    inner: int = 0
    gate_up: int = 0

    @property
    def is_known(self) -> bool:
        return self.qkv > 0

    @classmethod
    def of(cls, model: nn.Module) -> "LayerWidths":
        """Measure the decoder layers of `model`, on any device; the first one has the roles."""
        config, base = text_config(model), base_model(model)
        shapes, layers = linear_shapes(base), find_decoder_layers(model)
        depth = max(1, config.num_hidden_layers)
        weights = sum(out * width for out, width in shapes.values()) // depth
        largest = max((out * width for out, width in shapes.values()), default=0)
        linears = sum(map(sum, shapes.values())) // depth
        plain = cls(config.hidden_size, linears, weights, largest)
        if layers is None or not len(layers) or config.model_type not in FAMILIES:
            return plain
        names = layer_names(model, layers[0])

        def linear(role: str) -> BaseLinear | None:
            name = getattr(names, role)
            found = None if name is None else _unwrapped(layers[0].get_submodule(name))
            return found if isinstance(found, BaseLinear) else None

        roles = {role: linear(role) for role in ("q", "k", "v", "o", "gate", "up", "down")}
        if any(roles[role] is None for role in ("q", "k", "v", "o", "up", "down")):
            return plain
        found = {role: layer for role, layer in roles.items() if layer is not None}
        gate_up = _distinct(found, "gate", "up")
        head_dim = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return cls(
            config.hidden_size,
            linears,
            weights,
            max(largest, sum(layer.out_features * layer.in_features for layer in gate_up)),
            qkv=sum(layer.out_features for layer in _distinct(found, "q", "k", "v")),
            rotated=head_dim * (config.num_attention_heads + key_heads),
            attention=found["o"].in_features,
            inner=found["down"].in_features,
            gate_up=sum(layer.out_features for layer in gate_up),
        )

    def saved(self, itemsize: int, *, fused: bool) -> int:
        """Return the bytes per token that autograd saves in a layer.

        A fused layer saves its input, that of the MLP's norm, both norms, the output of v, the
        rotated query and key, the output of attention, and those of gate and up. On PEFT's
        path, each adapter has an input of its own, the activation and its product are saved, too,
        and norms keep two fp32 copies of the residual stream.
        """
        if fused and self.is_known:
            # The outputs of q, k and v without q and k have the width of v.
            return itemsize * (4 * self.hidden + self.qkv + self.attention + self.gate_up)
        return itemsize * (self.linears + self.inner + self.rotated) + 2 * 4 * self.hidden


def _unwrapped(module: nn.Module) -> nn.Module:
    """Return the linear inside of PEFT's module."""
    return getattr(module, "base_layer", module)


def _distinct(layers: dict[str, BaseLinear], *roles: str) -> list[BaseLinear]:
    """Return the linears that have `roles`; a linear with several roles is there once."""
    return list(dict.fromkeys(layers[role] for role in roles if role in layers))


@dataclass(frozen=True)
class TrainingPeak:
    """Bytes at the peaks of a training step, in addition to parameters and optimizer state.

    Attributes:
        kept: What all layers keep from their forward to their backward pass.
        layer: What a layer keeps that has been recomputed; 0 if none is.
        working: Dense weights, casts of adapters, and gradients while the backward pass is in a
            layer.
    """

    kept: int
    layer: int
    working: int

    @classmethod
    def of(cls, workload: Workload, model: nn.Module, dtype: torch.dtype) -> "TrainingPeak":
        """Estimate the peaks of a micro-batch of `workload`.

        Args:
            workload: The settings of the run.
            model: The model on any device, with its adapters. Without training it keeps nothing.
            dtype: Dtype of activations.
        """
        widths, tokens, itemsize = LayerWidths.of(model), workload.tokens, dtype.itemsize
        if not workload.trains:
            return cls(0, 0, 2 * itemsize * widths.largest_block)
        depth = text_config(model).num_hidden_layers
        fused = workload.is_fused and widths.is_known
        saved = tokens * widths.saved(itemsize, fused=fused)
        recomputed = workload.recomputed_layers(depth)
        inputs = min(2, recomputed) if workload.offloads_activations else recomputed
        hidden = tokens * widths.hidden * itemsize
        kept = inputs * hidden + (depth - recomputed) * saved
        # The input of a recomputed layer is kept already.
        layer = saved - hidden if recomputed == depth else 0
        gradients = hidden + tokens * itemsize * widths.inner
        if not fused:
            masks = MASK_BYTES * workload.micro_batch_size * workload.max_seq_len**2
            return cls(kept, layer, gradients + 2 * itemsize * widths.largest_block + masks)
        # The dense weights of a recomputed MLP are kept for its backward pass.
        mlp = widths.hidden * (widths.gate_up + widths.inner)
        dense = mlp if recomputed == depth else widths.largest_block
        return cls(kept, layer, gradients + itemsize * dense + _cast_bytes(model, dtype))


def _cast_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Return the bytes of the copies of all adapters in `dtype`, which last for a step."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = (p for name, p in trained.items() if ".lora_" in name and p.dtype != dtype)
    return sum(p.numel() for p in matrices) * dtype.itemsize


def activation_bytes(workload: Workload, model: nn.Module, dtype: torch.dtype) -> int:
    """Return the bytes that autograd saves for a micro-batch, at their peak."""
    peak = TrainingPeak.of(workload, model, dtype)
    return peak.kept + peak.layer
