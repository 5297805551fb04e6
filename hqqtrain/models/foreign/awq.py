"""Checkpoints of AWQ tools in the packing `gemm`: 4 bits, eight columns in a word.

A layer [out, in] has `qweight` int32 [in, out / 8], `qzeros` int32 [groups, out / 8] and `scales`
[groups, out]. Within a word, the even columns come before the odd ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hqqtrain.common.errors import UserError
from hqqtrain.models.foreign.base import (
    AGAIN,
    META_DTYPES,
    ForeignLayer,
    StoredTensors,
    check_tensor,
    make_layout,
    modules_with,
    refuse,
    shape_of,
)
from hqqtrain.quant.spec import QuantSpec
from hqqtrain_kernels.bit_stream import unpack_bit_stream

NBITS = 4
_WORD_COLUMNS = 8
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Column of a word -> where its code is in the word."""


@dataclass(frozen=True)
class AwqLayer(ForeignLayer):
    """A layer whose columns of output are packed eight by eight."""

    def codes(self, stored: StoredTensors, units: slice) -> Tensor:
        return self._columns(stored, "qweight", units)

    def scale(self, stored: StoredTensors, units: slice) -> Tensor:
        return stored.read_region(f"{self.name}.scales", None, units).t()

    def zero(self, stored: StoredTensors, units: slice) -> Tensor:
        return self._columns(stored, "qzeros", units)

    def _columns(self, stored: StoredTensors, key: str, units: slice) -> Tensor:
        """Return some columns of a packed matrix as rows."""
        first = units.start // _WORD_COLUMNS
        stop = -(-units.stop // _WORD_COLUMNS)
        words = stored.read_region(f"{self.name}.{key}", None, slice(first, stop))
        codes = unpack_bit_stream(words, NBITS, words.shape[1] * _WORD_COLUMNS)
        columns = codes.unflatten(1, (-1, _WORD_COLUMNS))[..., _PLACES].flatten(1)
        start = first * _WORD_COLUMNS
        return columns[:, units.start - start : units.stop - start].t()


def find_layers(stored: StoredTensors, config: Mapping[str, Any]) -> dict[str, ForeignLayer]:
    """Return the layers of an AWQ checkpoint, by module.

    Raises:
        UserError: A tensor is missing or has another shape, or the packing is not `gemm` of 4 bits.
    """
    version, bits = config.get("version") or config.get("format") or "gemm", config.get("bits", 4)
    if str(version).lower() != "gemm" or bits != NBITS:
        raise refuse(stored, f"awq with version={version}, bits={bits}", "only gemm with 4 bits is")
    return {module: _layer(stored, module) for module in modules_with(stored, "qweight")}


def _layer(stored: StoredTensors, module: str) -> AwqLayer:
    names = {key: f"{module}.{key}" for key in ("qweight", "qzeros", "scales")}
    groups, out_features = shape_of(stored, names["scales"])
    in_features = shape_of(stored, names["qweight"])[0]
    if not groups or in_features % groups or out_features % _WORD_COLUMNS:
        raise UserError(
            f"{stored.folder}: {module} [{out_features}, {in_features}] has {groups} groups, or "
            f"columns that do not fill a word; {AGAIN}"
        )
    words = out_features // _WORD_COLUMNS
    dtype = check_tensor(stored, names["scales"], (groups, out_features), META_DTYPES)
    check_tensor(stored, names["qweight"], (in_features, words), [torch.int32])
    check_tensor(stored, names["qzeros"], (groups, words), [torch.int32])
    spec = QuantSpec(NBITS, in_features // groups, 1, "awq", dtype, "integer")
    layout = make_layout(stored, module, spec, out_features, in_features)
    return AwqLayer(module, spec, layout, tuple(names.values()))
