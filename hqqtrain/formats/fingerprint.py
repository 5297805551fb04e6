"""A hash of the bits of a quantized model that is the same for every sharding.

Ranks hold different rows, and process them in a different order at every world size. Each row is
therefore hashed separately, with its position as key. The hashes are added, because a sum does not
depend on the order. Ranks exchange only 128 bits each. At the end, sha256 hashes the sums together
with the settings that give the bits their meaning. Sums of hashes distinguish models, but do not
protect against adversaries.

The hash of a row is a multilinear hash of its words (Lemire and Kaser, "Strongly universal string
hashing is fast", 2014) in wrapping integer arithmetic. It runs on the device that holds the rows, a
GPU included, at memory bandwidth. The alternative, sha256 of every row, takes a minute of Python
for 70 billion weights.
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
"""Number of independent 64-bit hashes."""

_CPU_CHUNK_WORDS, _GPU_CHUNK_WORDS = 1 << 18, 1 << 23
"""Words that are hashed at a time.

On a CPU they fit in the cache: one core hashes 1.5 GB/s, but 0.8 GB/s with a quarter or four times
as many words.
"""


class Fingerprint:
    """Sums keyed hashes of rows on their own device; ranks exchange `total` and `merge` it."""

    def __init__(self) -> None:
        self._sums = torch.zeros(_LANES, dtype=torch.int64)

    @property
    def total(self) -> list[int]:
        """The sums of the lanes as signed 64-bit integers. Synchronizes with the device."""
        return self._sums.tolist()

    def update(self, module: str, tensor_name: str, first_row: int, rows: Tensor) -> None:
        """Add rows of one tensor. Does not synchronize with a GPU.

        The caller must add each row of the model exactly once over all ranks.

        Args:
            module: The name of the module.
            tensor_name: `W_q`, `scale` or `zero`.
            first_row: The index of the first of `rows` in the whole tensor.
            rows: [n, ...]. The bytes of W_q are hashed, whatever its storage dtype, and the bits of
                scale and zero in their own dtype.
        """
        if rows.shape[0] == 0:
            return
        words = _words(rows.detach().reshape(rows.shape[0], -1), tensor_name)
        multipliers = _multipliers(words.shape[1], words.device)
        chunk_words = _CPU_CHUNK_WORDS if words.device.type == "cpu" else _GPU_CHUNK_WORDS
        step = max(1, chunk_words // max(1, words.shape[1]))
        tensor_key = _hash_name(f"{module}.{tensor_name}")
        self._sums = self._sums.to(words.device)
        for start in range(0, words.shape[0], step):
            chunk = words[start : start + step].to(torch.int64)
            # The key of a row is the hash of its tensor's name plus its index in the whole tensor.
            row_indices = torch.arange(len(chunk), device=words.device) + (first_row + start)
            row_keys = _mix(row_indices + tensor_key)
            for lane in range(_LANES):
                # Multilinear hash of the words, combined with the key. All sums wrap around.
                self._sums[lane] += _mix((chunk * multipliers[lane]).sum(1) ^ row_keys).sum()

    def merge(self, total: Sequence[int]) -> None:
        """Add another rank's `total`."""
        self._sums += torch.tensor(total, dtype=torch.int64, device=self._sums.device)

    def hexdigest(self, settings: Mapping[str, Mapping[str, Any]]) -> str:
        """Return `sha256:...` of all rows, the layout version and `settings` by module (JSON)."""
        settings_json = json.dumps([LAYOUT_VERSION, settings], sort_keys=True)
        sums = b"".join(lane.to_bytes(8, "little", signed=True) for lane in self.total)
        return f"sha256:{hashlib.sha256(sums + settings_json.encode()).hexdigest()}"


def _words(rows: Tensor, tensor_name: str) -> Tensor:
    """View rows as integers, one for each number, or for 4 bytes of W_q.

    A row of W_q has whole tiles of 16 bytes, so 4 bytes divide it.
    """
    rows = rows.contiguous()
    if tensor_name == "W_q":
        return as_bytes(rows).view(torch.int32)
    return view_as_integers(rows)


def _hash_name(name: str) -> int:
    """Return a 63-bit hash of a tensor's name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1


@functools.lru_cache(maxsize=64)
def _multipliers(count: int, device: torch.device) -> Tensor:
    """Return fixed pseudo-random odd numbers, int64 [lanes, count].

    The product with an odd number is invertible, so a change of a single word is never lost.
    """
    numbers = torch.arange(_LANES * count, dtype=torch.int64).view(_LANES, count)
    return (_mix(_mix(numbers + 1)) | 1).to(device)


def _mix(x: Tensor) -> Tensor:
    """Permute int64 values with the finalizer of splitmix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ _logical_shift_right(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _logical_shift_right(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _logical_shift_right(x, 31)


def _logical_shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift right as if the int64 were unsigned."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
