"""Reproducible random weights of any architecture, generated where they are needed.

They allow measuring memory and speed, and testing sharding, without a download. A weight depends
only on seed, tensor name, row and column, and is computed with integers. So any rows, generated on
any device, have the same bits as within the whole tensor.
"""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hqqtrain.common.errors import UserError
from hqqtrain.models.build import load_hf_config
from hqqtrain.models.families.structure import text_config
from hqqtrain.models.fqn import base_model, expected_shapes, tied_names
from hqqtrain.models.source import ModelSource
from hqqtrain.models.weights.safetensors import SafetensorsReader

_CHUNK = {"cuda": 1 << 23, "cpu": 1 << 19}
"""Weights generated at a time by device type: bounds temporary memory, and fits a CPU's cache."""

_BYTES_MEAN, _BYTES_DEVIATION = 8 * 127.5, (8 * (256**2 - 1) / 12) ** 0.5
"""Mean and standard deviation of the sum of 8 uniform bytes.

The sum is nearly normal and reaches 4.9 standard deviations.
"""


def open_weight_source(
    source: ModelSource, model: nn.Module, device: torch.device
) -> "SafetensorsReader | SyntheticReader":
    """Open the reader, or the generator, of the weights of `model`.

    Args:
        source: The source of the weights.
        model: The model on meta; its linears may already be replaced.
        device: The device that synthetic weights are generated on.

    Raises:
        UserError: A file is missing or not a safetensors file, or the vocabulary of a synthetic
            model is smaller than that of the bundled tokenizer.
    """
    if source.kind != "synthetic":
        pinned = device.type == "cuda"
        return SafetensorsReader(source.path, aliases=tied_names(model), pin_memory=pinned)
    config, text = base_model(model).config, text_config(model)
    needed = load_hf_config(source.tokenizer).vocab_size
    if text.vocab_size < needed:
        raise UserError(
            f"model.source=synthetic: the bundled tokenizer needs a vocabulary of {needed} tokens, "
            f"{source.name} has only {text.vocab_size}; use a model with a larger one."
        )
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    deviation = getattr(text, "initializer_range", 0.02)
    shapes = expected_shapes(model, packed=False)
    return SyntheticReader(shapes, dtype, device, deviation=deviation)


class SyntheticReader:
    """A generator of random tensors with the interface of `SafetensorsReader`.

    Matrices are nearly normal. Vectors named `*bias` are zeros; the other vectors, the weights of
    norms, are ones.

    Args:
        shapes: Tensor name -> shape of all tensors.
        dtype: Dtype of the tensors.
        device: Device that the tensors are generated on.
        deviation: Standard deviation of the matrices.
        seed: Seed of the matrices.

    Attributes:
        bytes_read: Bytes generated so far.
        ahead: Reads to prefetch: none, because generating in advance hides no latency.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device,
        *, deviation: float = 0.02, seed: int = 0,
    ) -> None:  # fmt: skip
        self.ahead = 0
        self._shapes, self._dtype, self._device = dict(shapes), dtype, device
        self._deviation, self._seed = deviation, seed
        self.bytes_read = 0

    @property
    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._shapes)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        sizes = (torch.Size(shape).numel() for shape in self._shapes.values())
        return sum(sizes) * self._dtype.itemsize

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Check like `CheckpointReader.check`; a mismatch is a bug, not an error of the user."""
        assert all(self._shapes[name] == tuple(shape) for name, shape in expected.items())
        return []

    def read(self, name: str, rows: Sequence[slice] | None = None) -> Tensor:
        """Generate tensor `name`, or some of its rows, on the device.

        Args:
            name: Name of the tensor.
            rows: Slices of dimension 0, which are concatenated; None: all rows.
        """
        shape = self._shapes[name]
        wanted = [slice(0, shape[0])] if rows is None else rows
        row_ids = torch.cat([torch.arange(r.start, r.stop, device=self._device) for r in wanted])
        out = torch.empty(len(row_ids), *shape[1:], dtype=self._dtype, device=self._device)
        if len(shape) == 1:
            out.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            # 31 bits that identify the tensor: every tensor gets numbers of its own.
            digest = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
            tensor_key = int.from_bytes(digest[:4], "little") >> 1
            self._fill(out.flatten(1), tensor_key, row_ids)
        self.bytes_read += out.nbytes
        return out

    def _fill(self, out: Tensor, tensor_key: int, row_ids: Tensor) -> None:
        """Write the numbers of rows `row_ids` [n] into `out` [n, columns]."""
        # One hash per column, and one per row of this tensor.
        columns = _hash(torch.arange(out.shape[1], device=out.device, dtype=torch.int32))
        row_keys = _hash(row_ids.to(torch.int32) ^ tensor_key)
        step = max(1, _CHUNK.get(out.device.type, _CHUNK["cpu"]) // out.shape[1])
        for start in range(0, len(row_ids), step):
            # Two hashes of (tensor, row, column) give 8 bytes; their sum is nearly normal, and it
            # is an exact integer on every device. int32 arithmetic wraps around, as intended.
            bits = _hash(row_keys[start : start + step, None] + columns)
            total = _sum_of_bytes(bits) + _sum_of_bytes(_hash(bits + 0x3C6EF372))
            centered = total.to(torch.float32) - _BYTES_MEAN
            out[start : start + step] = centered * (self._deviation / _BYTES_DEVIATION)


def _hash(x: Tensor) -> Tensor:
    """Hash an int32 tensor in place; the mapping is a permutation of the 32-bit integers.

    The function is lowbias32 by Chris Wellons (hash-prospector).
    """
    # torch shifts int32 arithmetically: the masks clear the copies of the sign bit.
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32))):
        x = x.bitwise_xor_((x >> shift) & ((1 << (32 - shift)) - 1)).mul_(factor)
    return x.bitwise_xor_((x >> 16) & 0xFFFF)


def _sum_of_bytes(x: Tensor) -> Tensor:
    """Return the sum of the 4 bytes of every int32, adding two pairs of bytes at a time."""
    pairs = (x & 0x00FF00FF) + ((x >> 8) & 0x00FF00FF)
    return (pairs & 0xFFFF) + (pairs >> 16)
