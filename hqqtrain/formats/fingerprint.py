"""A name for the bits of a quantized model that every sharding computes alike.

Ranks hold different rows, in another order at every world size. So each row is hashed on its
own, keyed by its place, and the hashes are added: addition knows no order. Nothing is gathered
but 128 bits a rank. What they leave out (the settings that give the bits their meaning) is hashed
with them at the end, by sha256. A sum of hashes tells apart models, not adversaries.

A row's hash is a multilinear one (Lemire and Kaser, "Strongly universal string hashing is fast",
2014) of its words, in integers that wrap around: where the rows are, a GPU included, at the speed
of memory. sha256 of every row took a minute of Python for 70 billion weights.
"""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hqqtrain.distributed.bit_exactness import view_as_integers
from hqqtrain_kernels.layout import LAYOUT_VERSION
from hqqtrain_kernels.reference import as_bytes

_LANES = 2
"""Hashes of 64 bits, independent of each other."""

_CHUNK = {"cpu": 1 << 18}
"""Words hashed at a time, what a CPU's cache holds: 1.5 GB/s on one core, and 0.8 with a quarter or
four times as many."""

_DEFAULT_CHUNK = 1 << 23


class Fingerprint:
    """Sums keyed hashes of rows, where these are. `total` is what ranks exchange and `merge`."""

    def __init__(self) -> None:
        self._sums = torch.zeros(_LANES, dtype=torch.int64)

    @property
    def total(self) -> list[int]:
        """The sums of the lanes, each of 64 bits with its sign. Waits for the device."""
        return self._sums.tolist()

    def update(self, module: str, tensor_name: str, first_row: int, rows: Tensor) -> None:
        """Add `rows` [n, ...], rows first_row ... of tensor `module`.`tensor_name`.

        W_q counts as its bytes, whatever dtype it is viewed as; scale and zero as stored. Each
        row of a model must be added exactly once over all ranks. Not waited for on a GPU.
        """
        if rows.shape[0] == 0:
            return
        words = _words(rows.detach().reshape(rows.shape[0], -1), tensor_name)
        multipliers = _multipliers(words.shape[1], words.device)
        step = max(1, _CHUNK.get(words.device.type, _DEFAULT_CHUNK) // max(1, words.shape[1]))
        key = _key(f"{module}.{tensor_name}")
        self._sums = self._sums.to(words.device)
        for start in range(0, words.shape[0], step):
            part = words[start : start + step].to(torch.int64)
            place = torch.arange(len(part), device=words.device) + (first_row + start)
            place = _mixed(place + key)
            for lane in range(_LANES):
                self._sums[lane] += _mixed((part * multipliers[lane]).sum(1) ^ place).sum()

    def merge(self, total: Sequence[int]) -> None:
        """Add another rank's `total`."""
        self._sums += torch.tensor(total, dtype=torch.int64, device=self._sums.device)

    def hexdigest(self, settings: Mapping[str, Mapping[str, Any]]) -> str:
        """`sha256:...` of all rows, the layout version, and `settings` by module (JSON values)."""
        meaning = json.dumps([LAYOUT_VERSION, settings], sort_keys=True)
        sums = b"".join(lane.to_bytes(8, "little", signed=True) for lane in self.total)
        return f"sha256:{hashlib.sha256(sums + meaning.encode()).hexdigest()}"


def _words(rows: Tensor, tensor_name: str) -> Tensor:
    """Of W_q 4 bytes each, whose rows are whole tiles of 16; of others each number's bits."""
    rows = rows.contiguous()
    if tensor_name == "W_q":
        return as_bytes(rows).view(torch.int32)
    return view_as_integers(rows)


def _key(name: str) -> int:
    """63 bits."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1


@functools.lru_cache(maxsize=64)
def _multipliers(count: int, device: torch.device) -> Tensor:
    """Odd, so that no change of a single word is lost: int64 [lanes, count]."""
    numbers = torch.arange(_LANES * count, dtype=torch.int64).view(_LANES, count)
    return (_mixed(_mixed(numbers + 1)) | 1).to(device)


def _mixed(x: Tensor) -> Tensor:
    """Another int64 for each, one to one (how splitmix64 ends; Steele, Lea, Flood 2014)."""
    x = (x ^ _right(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _right(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _right(x, 31)


def _right(x: Tensor, by: int) -> Tensor:
    """Shifted as if it had no sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)
