"""A name for the bits of a quantized model that every sharding computes alike.

Ranks hold different rows, in another order at every world size. So each row is hashed on its
own, keyed by its place, and the hashes are added: addition knows no order. Nothing is gathered
but one 256-bit number a rank. What the number leaves out (the settings that give the bits their
meaning) is hashed with it at the end. A sum of hashes tells apart models, not adversaries.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

from hqqtrain_kernels.layout import LAYOUT_VERSION

_MODULUS = 1 << 256


class Fingerprint:
    """Sums keyed sha256 hashes of rows. `total` is what ranks exchange and `merge`."""

    def __init__(self) -> None:
        self.total = 0

    def update(self, module: str, tensor_name: str, first_row: int, rows: torch.Tensor) -> None:
        """Add `rows` [n, ...], rows first_row ... of tensor `module`.`tensor_name`.

        W_q counts as its bytes, whatever dtype it is viewed as; scale and zero as stored. Each
        row of a model must be added exactly once over all ranks.
        """
        if rows.shape[0] == 0:
            return
        flat = rows.detach().cpu().contiguous().view(rows.shape[0], -1).view(torch.uint8)
        data, width = flat.numpy().data.cast("B"), flat.shape[1]
        key = hashlib.sha256(f"{module}.{tensor_name}\0".encode())
        total = 0
        for i in range(flat.shape[0]):
            row = key.copy()
            row.update((first_row + i).to_bytes(8, "little"))
            row.update(data[i * width : (i + 1) * width])
            total += int.from_bytes(row.digest(), "little")
        self.merge(total)

    def merge(self, total: int) -> None:
        """Add another rank's `total`."""
        self.total = (self.total + total) % _MODULUS

    def hexdigest(self, settings: Mapping[str, Mapping[str, Any]]) -> str:
        """`sha256:...` of all rows, the layout version, and `settings` by module (JSON values)."""
        meaning = json.dumps([LAYOUT_VERSION, settings], sort_keys=True)
        final = hashlib.sha256(self.total.to_bytes(32, "little") + meaning.encode())
        return f"sha256:{final.hexdigest()}"
