"""The protocol of a weight source, which loading reads without knowing where weights come from."""

from typing import Protocol

from torch import Tensor


class WeightSource(Protocol):
    """Source of weights: reads rows of tensors by name.

    Attributes:
        bytes_read: Bytes that `read` has returned so far.
        prefetch_depth: Number of reads that may run before their results are requested. Each of
            them needs memory for its rows.
    """

    bytes_read: int
    prefetch_depth: int

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, rows: list[slice] | None = None) -> Tensor: ...
