"""Checkpoints of hqq 0.2.8 in safetensors: 19 tensors a layer, most of them a single number.

`qmodel.pt`, hqq's other form, is converted to this one first; see `qmodel.py`. The codes, scales
and zeros are taken over as they are, for both axes.
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
    check_tensor,
    make_layout,
    modules_with,
)
from hqqtrain.quant.spec import QuantSpec
from hqqtrain_kernels.convert import HQQ_PACKINGS, hqq_shapes, read_hqq_codes
from hqqtrain_kernels.layout import Layout

PACKING_NAMES = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}
"""hqq's names of its packings, by nbits."""

DESCRIPTION = ("nbits", "group_size", "axis", "shape", "packing")
"""The tensors that say how a layer is quantized."""

_OTHERS = (
    "W_q", "scale", "zero", "view_as_float", "unpack_view_dtype", "compute_dtype", "quant_scale",
    "quant_zero", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise",
    "optimize", "round_zero",
)  # fmt: skip


@dataclass(frozen=True)
class HqqLayer(ForeignLayer):
    """A layer whose distant rows hqq has packed together."""

    def codes(self, stored: StoredTensors, units: slice) -> Tensor:
        name, dtype = f"{self.name}.W_q", HQQ_PACKINGS[self.layout.nbits][0]
        is_view = stored.stored_dtype(name) != dtype

        def read(rows: slice, columns: slice) -> Tensor:
            if is_view:  # a column of a float view has the codes of several columns
                return stored.read_region(name, rows).view(dtype)[:, columns]
            return stored.read_region(name, rows, columns)

        return read_hqq_codes(read, self.layout, units)

    def scale(self, stored: StoredTensors, units: slice) -> Tensor:
        return self._meta(stored, "scale", units)

    def zero(self, stored: StoredTensors, units: slice) -> Tensor:
        return self._meta(stored, "zero", units)

    def _meta(self, stored: StoredTensors, attribute: str, units: slice) -> Tensor:
        """Read scales or zeros, which hqq stores as one column (axis 1) or one row (axis 0)."""
        groups = slice(units.start * self.layout.groups, units.stop * self.layout.groups)
        region = (groups, None) if self.layout.axis == 1 else (None, groups)
        values = stored.read_region(f"{self.name}.{attribute}", *region)
        return values.reshape(-1, self.layout.groups)


def find_layers(stored: StoredTensors, config: Mapping[str, Any]) -> dict[str, ForeignLayer]:
    """Return the layers that hqq has quantized, by module.

    Raises:
        UserError: A tensor is missing or has another shape, or a layer has settings that our format
            cannot express.
    """
    modules = modules_with(stored, "W_q")
    needed = [f"{module}.{key}" for module in modules for key in DESCRIPTION]
    names = set(stored.stored_names)
    for name in needed:
        if name not in names:
            raise UserError(
                f"{stored.folder}: {name} is missing. Only checkpoints of hqq 0.2 are read, which "
                f"have it: load older ones with their version of hqq; or {AGAIN}"
            )
    small = stored.read_small(needed)
    return {module: _layer(stored, module, small) for module in modules}


def _layer(stored: StoredTensors, module: str, small: Mapping[str, Tensor]) -> HqqLayer:
    where = f"{stored.folder}: {module}"

    def number(key: str) -> int:
        value = small[f"{module}.{key}"].reshape(-1)[0].item()
        if int(value) != value:
            raise UserError(f"{where}: {key}={value} is no integer: the file is damaged; {AGAIN}")
        return int(value)

    nbits = number("nbits")
    packing = bytes(small[f"{module}.packing"].reshape(-1).to(torch.uint8).tolist())
    if nbits not in PACKING_NAMES or packing != PACKING_NAMES[nbits].encode():
        shown = packing.decode("ascii", "replace")
        raise UserError(
            f"{where}: nbits={nbits} packed as {shown!r} cannot be taken over; hqqtrain has "
            f"{', '.join(map(str, PACKING_NAMES))} bits in hqq's own packing: {INSTEAD}"
        )
    shape = small[f"{module}.shape"].reshape(-1).tolist()
    if len(shape) != 2:
        raise UserError(f"{where}: has the shape {shape}, which is not that of a matrix; {AGAIN}")
    dtype = _check_meta_dtype(stored, module)
    spec = QuantSpec(nbits, number("group_size"), number("axis"), "hqq", dtype)
    layout = make_layout(stored, module, spec, *map(int, shape))
    _check_shapes(stored, module, layout)
    tensors = [f"{module}.{key}" for key in (*DESCRIPTION, *_OTHERS)]
    return HqqLayer(module, spec, layout, tuple(tensors))


def _check_meta_dtype(stored: StoredTensors, module: str) -> torch.dtype:
    """Return the dtype of scale and zero."""
    for name in (f"{module}.scale", f"{module}.zero"):
        if name not in stored.stored_names:
            raise UserError(
                f"{stored.folder}: {name} is missing. hqq before 0.2 has quantized scales and "
                f"zeros, too, which cannot be taken over: {INSTEAD}"
            )
    return stored.stored_dtype(f"{module}.scale")


def _check_shapes(stored: StoredTensors, module: str, layout: Layout) -> None:
    try:
        (rows, columns), meta_shape = hqq_shapes(layout)
    except ValueError as error:
        raise UserError(f"{stored.folder}: {module}: {error}; {AGAIN}") from error
    dtype = stored.stored_dtype(f"{module}.scale")
    check_tensor(stored, f"{module}.scale", meta_shape, META_DTYPES)
    check_tensor(stored, f"{module}.zero", meta_shape, [dtype])
    integers, name = HQQ_PACKINGS[layout.nbits][0], f"{module}.W_q"
    stored_dtype = stored.stored_dtype(name)
    if stored_dtype in META_DTYPES:  # view_as_float
        columns = columns * integers.itemsize // stored_dtype.itemsize
    check_tensor(stored, name, (rows, columns), [integers, *META_DTYPES])
