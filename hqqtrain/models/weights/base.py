"""The protocol of a weight source: rows of tensors, by name."""

from typing import Protocol

from torch import Tensor


class WeightSource(Protocol):
    """Source of weights: reads rows of tensors by name.

    `ahead` is the number of reads that may run before their results are requested. Each of them
    needs memory for its rows.
    """

    bytes_read: int
    ahead: int

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, rows: list[slice] | None = None) -> Tensor: ...
