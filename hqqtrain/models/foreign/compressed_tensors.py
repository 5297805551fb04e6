"""Checkpoints of compressed-tensors in the format `pack-quantized`, as llm-compressor writes them.

A layer [out, in] has `weight_packed` int32, a stream of codes along each row; `weight_scale`
[out, groups]; `weight_shape`; and for asymmetric codes `weight_zero_point`, which is either a
stream of codes down each column [out * bits / 32, groups] int32, or int8 [out, groups] in older
releases. Codes and zeros are signed, and stored plus 2^(bits - 1).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hqqtrain.common.errors import UserError
from hqqtrain.models.foreign.base import (
    AGAIN,
    INSTEAD,
    META_DTYPES,
    ForeignLayer,
    StoredTensors,
    check_order,
    check_tensor,
    make_layout,
    modules_with,
    refuse,
    shape_of,
)
from hqqtrain.quant.spec import QuantSpec
from hqqtrain_kernels.bit_stream import WORD_CODES, unpack_bit_stream, words_of

NBITS = (8, 4, 3, 2)
FORMAT = "pack-quantized"


@dataclass(frozen=True)
class CompressedLayer(ForeignLayer):
    """A layer whose codes run along its rows.

    Attributes:
        zeros: How zeros are stored: `none` (symmetric codes), `packed` or `plain`.
    """

    zeros: str

    def codes(self, stored: StoredTensors, units: slice) -> Tensor:
        words = stored.read_region(f"{self.name}.weight_packed", units)
        return unpack_bit_stream(words, self.layout.nbits, self.layout.in_features)

    def scale(self, stored: StoredTensors, units: slice) -> Tensor:
        return stored.read_region(f"{self.name}.weight_scale", units)

    def zero(self, stored: StoredTensors, units: slice) -> Tensor:
        name, nbits = f"{self.name}.weight_zero_point", self.layout.nbits
        middle = 1 << (nbits - 1)
        if self.zeros == "none":
            return torch.full((units.stop - units.start, self.layout.groups), middle)
        if self.zeros == "plain":
            return stored.read_region(name, units).to(torch.int16) + middle
        first = units.start // WORD_CODES * WORD_CODES
        rows = slice(words_of(first, nbits), words_of(units.stop, nbits))
        words = stored.read_region(name, rows)
        zeros = unpack_bit_stream(words.t(), nbits, units.stop - first)
        return zeros[:, units.start - first :].t()


def find_layers(stored: StoredTensors, config: Mapping[str, Any]) -> dict[str, ForeignLayer]:
    """Return the layers of a compressed-tensors checkpoint, by module.

    Raises:
        UserError: A tensor is missing or has another shape, or the format is one that ours cannot
            express, such as sparse weights or quantized activations.
    """
    for kind in _obstacles(config):
        raise refuse(stored, kind, f"of compressed-tensors only {FORMAT} integer weights are")
    modules = modules_with(stored, "weight_packed")
    shapes = stored.read_small(f"{module}.weight_shape" for module in modules
                               if f"{module}.weight_shape" in stored.stored_names)  # fmt: skip
    layers: dict[str, ForeignLayer] = {
        module: _layer(stored, module, shapes.get(f"{module}.weight_shape")) for module in modules
    }
    check_order(stored, {name: layer.layout for name, layer in layers.items()}, "weight_g_idx")
    return layers


def _obstacles(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what our format cannot express, as it is written in the configuration."""
    groups = config.get("config_groups")
    groups = [g for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
    formats = {config.get("format"), *(group.get("format") for group in groups)} - {None, FORMAT}
    yield from (f"format={each}" for each in sorted(map(str, formats - {"mixed-precision"})))
    sparsity = config.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        yield f"sparsity_config.format={sparsity['format']}"
    if config.get("transform_config"):
        yield "transform_config"
    for group in groups:
        weights = group.get("weights")
        if group.get("input_activations"):
            yield "input_activations"
        if isinstance(weights, dict) and weights.get("type", "int") != "int":
            yield f"weights.type={weights['type']}"


def _layer(stored: StoredTensors, module: str, shape: Tensor | None) -> CompressedLayer:
    if shape is None or shape.numel() != 2:
        raise UserError(f"{stored.folder}: {module}.weight_shape is missing or no pair; {AGAIN}")
    out_features, in_features = map(int, shape.tolist())
    columns = shape_of(stored, f"{module}.weight_packed")[1]
    nbits = next((n for n in NBITS if words_of(in_features, n) == columns), None)
    if nbits is None:
        raise UserError(
            f"{stored.folder}: {module}.weight_packed has {columns} words a row for {in_features} "
            f"codes, which is no packing of {NBITS} bits that is known (3 bits only as "
            f"compressed-tensors 0.20 packs them); {INSTEAD}"
        )
    groups = shape_of(stored, f"{module}.weight_scale")[1]
    if not groups or in_features % groups:
        raise UserError(
            f"{stored.folder}: {module} has {groups} groups for {in_features} columns; {AGAIN}"
        )
    dtype = check_tensor(stored, f"{module}.weight_scale", (out_features, groups), META_DTYPES)
    check_tensor(stored, f"{module}.weight_packed", (out_features, columns), [torch.int32])
    zeros = _zeros(stored, module, nbits, (out_features, groups))
    spec = QuantSpec(nbits, in_features // groups, 1, "compressed-tensors", dtype, "integer")
    layout = make_layout(stored, module, spec, out_features, in_features)
    keys = ("packed", "scale", "shape", "zero_point", "g_idx")
    return CompressedLayer(
        module, spec, layout, tuple(f"{module}.weight_{key}" for key in keys), zeros
    )


def _zeros(stored: StoredTensors, module: str, nbits: int, shape: tuple[int, int]) -> str:
    """Return how the zeros of a layer [out, groups] are stored."""
    name = f"{module}.weight_zero_point"
    if name not in stored.stored_names:
        return "none"
    if stored.stored_dtype(name) == torch.int8:
        check_tensor(stored, name, shape, [torch.int8])
        return "plain"
    check_tensor(stored, name, (words_of(shape[0], nbits), shape[1]), [torch.int32])
    return "packed"
