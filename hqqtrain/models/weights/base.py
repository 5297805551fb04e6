"""The protocol of a weight source, which loading reads without knowing where weights come from."""

from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class NameMatch:
    """Where a checkpoint stores the tensors of a model.

    Attributes:
        stored: Name in the model -> name in the checkpoint, for all tensors that both have. Tied
            parameters have the same stored name.
        converted: Name in the model -> name in the checkpoint, for tensors that transformers
            computes from those of the checkpoint, for example by concatenating them.
        duplicates: Stored copies of tied parameters, which need not be read.
    """

    stored: dict[str, str] = field(default_factory=dict)
    converted: dict[str, str] = field(default_factory=dict)
    duplicates: frozenset[str] = frozenset()
