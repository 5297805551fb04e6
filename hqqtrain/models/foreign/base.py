"""A layer that another program has quantized, as loading sees it: rows of a packed weight of ours.

Each format has one module with a function that finds the layers of a checkpoint; `registry.py`
lists them. A layer knows its settings in our terms, and converts the units that a rank asks for
while it reads them. So a foreign checkpoint is loaded, sharded, fingerprinted and saved as if it
were our own quantized folder.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from hqqtrain.common.errors import UserError
from hqqtrain.quant.spec import QuantSpec
from hqqtrain_kernels.layout import Layout

SMALL_NUMEL = 64
"""Largest number of elements of a tensor that only describes a layer, such as its shape."""

META_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes that our scales and zeros can have."""


class StoredTensors(Protocol):
    """The tensors of a checkpoint, by their stored names.

    Attributes:
        folder: The folder of the checkpoint.
    """

    folder: Path

    @property
    def stored_names(self) -> Iterable[str]:
        """The names of all tensors."""

    def stored_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor that exists."""

    def stored_dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor that exists."""

    def read_region(
        self, name: str, rows: slice | None = None, columns: slice | None = None
    ) -> Tensor:
        """Read some rows and columns of a matrix; None: all of them."""

    def read_small(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read whole tensors that have at most `SMALL_NUMEL` elements."""


@dataclass(frozen=True)
class ForeignLayer(ABC):
    """A quantized linear layer of a foreign checkpoint.

    Attributes:
        name: The name of the module.
        spec: Its settings. `spec.solver` names the format.
        layout: The layout of our packed weight.
        tensors: The stored tensors that the weight consists of.
    """

    name: str
    spec: QuantSpec
    layout: Layout
    tensors: tuple[str, ...]

    @abstractmethod
    def codes(self, stored: StoredTensors, units: slice) -> Tensor:
        """Return the codes of some units, uint8 [n, unit_codes]."""

    @abstractmethod
    def scale(self, stored: StoredTensors, units: slice) -> Tensor:
        """Return the scales of some units [n, groups]."""

    @abstractmethod
    def zero(self, stored: StoredTensors, units: slice) -> Tensor:
        """Return the zeros of some units [n, groups], so that W = (W_q - zero) * scale."""


def modules_with(stored: StoredTensors, attribute: str) -> list[str]:
    """Return the modules that have a tensor `attribute`, in the order of their names."""
    ending = f".{attribute}"
    return sorted(n.removesuffix(ending) for n in stored.stored_names if n.endswith(ending))


def check_tensor(
    stored: StoredTensors, name: str, shape: tuple[int, ...], dtypes: Iterable[torch.dtype]
) -> torch.dtype:
    """Check that a tensor exists, in this shape and one of these dtypes; return its dtype.

    Raises:
        UserError: It does not.
    """
    if name not in stored.stored_names:
        raise UserError(f"{stored.folder}: {name} is missing; {AGAIN}")
    found, dtype = stored.stored_shape(name), stored.stored_dtype(name)
    if tuple(found) != tuple(shape) or dtype not in dtypes:
        known = " or ".join(str(each).removeprefix("torch.") for each in dtypes)
        raise UserError(
            f"{stored.folder}: {name} is {list(found)} {str(dtype).removeprefix('torch.')}, "
            f"expected {list(shape)} {known}; {AGAIN}"
        )
    return dtype


def shape_of(stored: StoredTensors, name: str) -> tuple[int, int]:
    """Return the shape of a matrix.

    Raises:
        UserError: There is no such tensor, or it is no matrix.
    """
    if name not in stored.stored_names:
        raise UserError(f"{stored.folder}: {name} is missing; {AGAIN}")
    shape = stored.stored_shape(name)
    if len(shape) != 2:
        raise UserError(f"{stored.folder}: {name} {list(shape)} is no matrix; {AGAIN}")
    return shape[0], shape[1]


def check_order(stored: StoredTensors, layouts: Mapping[str, Layout], key: str) -> None:
    """Check that the columns of each layer are in the order of their groups.

    Args:
        stored: The tensors of the checkpoint.
        layouts: The layouts of the layers, by module.
        key: The name of the tensor [in_features] with the group of each column, which a layer may
            have.

    Raises:
        UserError: The columns are in another order, and could not be reordered without a cost.
    """
    names = set(stored.stored_names)
    for module, layout in layouts.items():
        name = f"{module}.{key}"
        if name not in names:
            continue
        check_tensor(stored, name, (layout.in_features,), [torch.int32, torch.int64])
        groups = stored.read_region(name)
        if not torch.equal(groups.long(), torch.arange(len(groups)) // layout.group_size):
            raise refuse(
                stored, f"act-order (desc_act=true) of {module}", "only columns in order are"
            )


def refuse(stored: StoredTensors, kind: str, allowed: str) -> UserError:
    """Return the error for a kind of checkpoint that our format cannot express."""
    return UserError(f"{stored.folder}: {kind} cannot be taken over; {allowed}. Else {INSTEAD}")


AGAIN = "copy or download the checkpoint again, or use the full-precision model."
"""The end of messages about a checkpoint that is damaged."""

INSTEAD = "use the full-precision model that it was made from, and let hqqtrain quantize it."
"""The end of messages about a checkpoint that our format cannot express."""


def make_layout(
    stored: StoredTensors, module: str, spec: QuantSpec, out_features: int, in_features: int
) -> Layout:
    """Return the layout of a foreign weight.

    Raises:
        UserError: The sizes contradict each other, or our format has no such layout.
    """
    try:
        return Layout(out_features, in_features, spec.nbits, spec.group_size or 0, spec.axis)
    except ValueError as error:
        raise UserError(
            f"{stored.folder}: {module} cannot be taken over ({error}); {INSTEAD}"
        ) from error
