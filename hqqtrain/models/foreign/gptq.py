"""Checkpoints of GPTQ tools: gptqmodel, AutoGPTQ, and AutoRound where it packs as these do.

A layer [out, in] has `qweight` int32 [in * bits / 32, out], a stream of codes down each column,
`qzeros` int32 [groups, out * bits / 32], and `scales` [groups, out]. Bits and groups follow from
the shapes, because they may differ from layer to layer. In the first version of the format, zeros
are stored minus 1.
"""

from collections.abc import Mapping
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

_STORED_OFFSETS = {"gptq": 1, "gptq_v2": 0}
"""The number that is subtracted from a zero before it is stored, by `checkpoint_format`."""


@dataclass(frozen=True)
class GptqLayer(ForeignLayer):
    """A layer whose codes run down its columns.

    Attributes:
        stored_offset: What was subtracted from the zeros before they were stored.
    """

    stored_offset: int

    def codes(self, stored: StoredTensors, units: slice) -> Tensor:
        words = stored.read_region(f"{self.name}.qweight", None, units)
        return unpack_bit_stream(words.t(), self.layout.nbits, self.layout.in_features)

    def scale(self, stored: StoredTensors, units: slice) -> Tensor:
        return stored.read_region(f"{self.name}.scales", None, units).t()

    def zero(self, stored: StoredTensors, units: slice) -> Tensor:
        nbits, first = self.layout.nbits, units.start // WORD_CODES * WORD_CODES
        last = words_of(units.stop, nbits)
        words = stored.read_region(f"{self.name}.qzeros", None, slice(words_of(first, nbits), last))
        zeros = unpack_bit_stream(self._restored(words), nbits, units.stop - first)
        if nbits == 3:  # a code may begin in one word and end in the next
            zeros = (zeros + self.stored_offset) & 7
        return zeros[:, units.start - first :].t()

    def _restored(self, words: Tensor) -> Tensor:
        """Add what was subtracted from all zeros of a word, which may have borrowed a bit."""
        nbits = self.layout.nbits
        if nbits == 3 or not self.stored_offset:
            return words
        ones = sum(1 << shift for shift in range(0, 32, nbits))
        return words + ones  # wraps around


def find_layers(stored: StoredTensors, config: Mapping[str, Any]) -> dict[str, ForeignLayer]:
    """Return the layers of a GPTQ checkpoint, by module.

    Raises:
        UserError: A tensor is missing or has another shape, or the layout is one that our format
            cannot express.
    """
    version = config.get("checkpoint_format") or config.get("format") or "gptq"
    if config.get("is_marlin_format"):
        version = "marlin"
    if version not in _STORED_OFFSETS:
        raise refuse(stored, f"checkpoint_format={version}", "of gptq only gptq and gptq_v2 are")
    return layers_with_offset(stored, _STORED_OFFSETS[version], config)


def layers_with_offset(
    stored: StoredTensors, offset: int, config: Mapping[str, Any]
) -> dict[str, ForeignLayer]:
    """Return the layers whose zeros were stored minus `offset`; see `find_layers`."""
    layers: dict[str, ForeignLayer] = {
        module: _layer(stored, module, offset, config.get("bits"))
        for module in modules_with(stored, "qweight")
    }
    check_order(stored, {name: layer.layout for name, layer in layers.items()}, "g_idx")
    return layers


def _layer(stored: StoredTensors, module: str, offset: int, bits: Any) -> GptqLayer:
    names = {key: f"{module}.{key}" for key in ("qweight", "qzeros", "scales", "g_idx")}
    groups, out_features = shape_of(stored, names["scales"])
    rows = shape_of(stored, names["qweight"])[0]
    columns = shape_of(stored, names["qzeros"])[1]
    fitting = [n for n in NBITS if words_of(out_features, n) == columns and rows * 32 % n == 0]
    nbits = bits if bits in fitting else next(iter(fitting), None)
    if nbits is None:
        raise UserError(
            f"{stored.folder}: the shapes of {module} are not those of {NBITS} bits; {INSTEAD}"
        )
    in_features = rows * 32 // nbits
    if not groups or in_features % groups:
        raise UserError(
            f"{stored.folder}: {module} has {groups} groups for {in_features} columns; {AGAIN}"
        )
    dtype = check_tensor(stored, names["scales"], (groups, out_features), META_DTYPES)
    check_tensor(stored, names["qweight"], (rows, out_features), [torch.int32])
    check_tensor(stored, names["qzeros"], (groups, columns), [torch.int32])
    spec = QuantSpec(nbits, in_features // groups, 1, "gptq", dtype, "integer")
    layout = make_layout(stored, module, spec, out_features, in_features)
    return GptqLayer(module, spec, layout, tuple(names.values()), offset)
