"""Read a checkpoint whose embeddings and head have fewer rows than the model, for new tokens."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hqqtrain.models.weights.safetensors import SafetensorsReader

_CHUNK_ROWS = 1 << 12
"""Rows that are read at a time to compute their mean."""


class ResizedReader(SafetensorsReader):
    """A checkpoint to which the rows of new tokens are added.

    A new row is the mean of all rows of the checkpoint. transformers' `resize_token_embeddings`
    draws rows from a narrow normal distribution around this mean; without the random numbers, all
    ranks and all later runs have the same rows.

    Args and attributes are those of `SafetensorsReader`.
    """

    def __init__(self, folder: Path, *, pin_memory: bool = False) -> None:
        super().__init__(folder, pin_memory=pin_memory)
        self._rows, self._means = dict[str, int](), dict[str, Tensor]()

    def resize(self, rows: Mapping[str, int]) -> None:
        """Add rows to tensors; `rows` has their numbers of rows, by name."""
        self._rows = dict(rows)

    def shape(self, name: str) -> tuple[int, ...]:
        stored = super().shape(name)
        return (max(stored[0], self._rows[name]), *stored[1:]) if name in self._rows else stored

    def check(self, expected: dict[str, tuple[int, ...]]) -> list[str]:
        """Check like `SafetensorsReader.check`; the tensors with new rows may have fewer."""
        short = {
            name: super(ResizedReader, self).shape(name)
            for name in self._rows
            if name in expected and name in self and self.shape(name) == tuple(expected[name])
        }
        return super().check({**expected, **short})

    def read(self, name: str, rows: Sequence[slice] | None = None) -> Tensor:
        """Return a tensor, or some of its rows, which may be new; see `SafetensorsReader.read`."""
        if name not in self._rows:
            return super().read(name, rows)
        stored = super().shape(name)[0]
        rows = [slice(0, self.shape(name)[0])] if rows is None else rows
        if all(each.stop <= stored for each in rows):
            return super().read(name, rows)
        parts = []
        for each in rows:
            if each.start < stored:
                parts.append(super().read(name, [slice(each.start, min(each.stop, stored))]))
            if (new := each.stop - max(each.start, stored)) > 0:
                mean = self._mean(name)
                parts.append(mean.expand(new, *mean.shape))
        result = torch.cat(parts)
        return result.pin_memory() if self._pin_memory else result

    def _mean(self, name: str) -> Tensor:
        """Return the mean of all rows in the checkpoint, in their dtype."""
        if name not in self._means:
            stored = super().shape(name)
            total = torch.zeros(stored[1:], dtype=torch.float64)
            for start in range(0, stored[0], _CHUNK_ROWS):
                rows = super().read(name, [slice(start, min(start + _CHUNK_ROWS, stored[0]))])
                total += rows.double().sum(0)
            self._means[name] = (total / stored[0]).to(rows.dtype)
        return self._means[name]
