"""Estimate the memory that the full-precision model of an evaluation needs, from shapes alone."""

from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hqqtrain.config.groups import STREAMED_REFERENCES
from hqqtrain.distributed.strategies.base import Strategy
from hqqtrain.models.causal_lm import MAX_KEPT_BYTES, kept_hidden_bytes
from hqqtrain.models.families.structure import find_decoder_layers, text_config
from hqqtrain.models.fqn import base_tensors, expected_shapes, is_packed
from hqqtrain.models.layerwise import LayerwiseModel


@dataclass(frozen=True)
class ReferenceBytes:
    """Bytes of one rank for the full-precision model.

    Attributes:
        whole: The whole model, or the shard of this rank. It is offloaded if parameters are; a
            single process offloads its decoder layers alone.
        outside: What stays on the device of a streamed model, or of one with offloaded decoder
            layers: the parameters outside of them, unless the compared model has them, too.
        outputs: The hidden states that are kept on the host for all evaluations.
        layer: A decoder layer of a streamed model, and the inputs of the layers, until the hidden
            states are known; or two offloaded decoder layers.
    """

    whole: int = 0
    outside: int = 0
    outputs: int = 0
    layer: int = 0


def reference_bytes(
    reference: str,
    model: nn.Module,
    strategy: Strategy,
    *,
    tokens: int,
    sequence_tokens: int,
    dtype: torch.dtype,
    world_size: int,
) -> ReferenceBytes:
    """Return the bytes of one rank for the full-precision model.

    Args:
        reference: The value of `eval.reference`, or `off` if there is no such model.
        model: The compared model on meta, with HQQLinears in place.
        strategy: How the compared model is sharded, and a resident full-precision one.
        tokens: Held-out tokens of all ranks.
        sequence_tokens: Tokens of a sequence.
        dtype: Dtype of the weights and activations.
        world_size: Number of ranks.
    """
    if reference == "off":
        return ReferenceBytes()
    own_tokens, itemsize = -(-tokens // world_size), dtype.itemsize
    if reference not in STREAMED_REFERENCES:
        shards = strategy.parameter_shards(world_size)
        whole = itemsize * sum(_sizes_by_part(model)) // shards
        size = kept_hidden_bytes(model, own_tokens, dtype)
        keeps = not strategy.shards_parameters and size <= MAX_KEPT_BYTES
        outputs = size if keeps else 0
        if strategy.offloads_parameters and not strategy.shards_parameters:
            outside, *layers = (itemsize * size for size in _sizes_by_part(model))
            buffers = 2 * max(layers, default=0)
            return ReferenceBytes(sum(layers), outside=outside, outputs=outputs, layer=buffers)
        return ReferenceBytes(whole=whole, outputs=outputs)
    shares = not (strategy.shards_parameters or strategy.offloads_parameters)
    outside, *layers = _sizes_by_part(model, without=shared_tensors(model) if shares else ())
    return ReferenceBytes(
        outside=itemsize * outside,
        outputs=itemsize * own_tokens * text_config(model).hidden_size,
        # The masks that keep texts apart have a byte for each pair of tokens of a sequence.
        layer=itemsize * max(layers, default=0) + own_tokens * sequence_tokens,
    )


def shared_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a quantized model that the full-precision one has, too, by name."""
    return {
        name: tensor.detach()
        for name, module, attribute, tensor in base_tensors(model)
        if not (tensor.requires_grad or is_packed(module, attribute))
    }


def _sizes_by_part(model: nn.Module, without: Container[str] = ()) -> list[int]:
    """Return the elements of the dense model: outside of the decoder layers, then of each layer.

    Tensors whose names are in `without` do not count.
    """
    names = [] if find_decoder_layers(model) is None else LayerwiseModel(model).names
    numbers = {name: number for number, name in enumerate(names, 1)}
    depth, sizes = "".join(names[:1]).count(".") + 1, [0] * (len(names) + 1)
    for name, shape in expected_shapes(model).items():
        prefix = ".".join(name.split(".")[:depth])
        if name not in without:
            sizes[numbers.get(prefix, 0)] += torch.Size(shape).numel()
    return sizes
