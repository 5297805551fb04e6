"""Reproducible random weights of any architecture, made where they are needed.

With them size and speed are shown, and sharding is tested, without a download. A number depends on
seed, name, row and column alone, and is computed with integers: so any rows, on any device, have
the bits that the whole tensor has.
"""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hqqtrain.common.errors import UserError
from hqqtrain.models.build import load_hf_config
from hqqtrain.models.fqn import base_model, expected_shapes, tied_names
from hqqtrain.models.source import ModelSource
from hqqtrain.models.weights.safetensors import SafetensorsReader

_CHUNK = {"cuda": 1 << 23, "cpu": 1 << 19}
"""Numbers made at once: what they take meanwhile stays small, in a CPU's cache even."""

_BYTES_MEAN, _BYTES_DEVIATION = 8 * 127.5, (8 * (256**2 - 1) / 12) ** 0.5
"""Of the sum of 8 uniform bytes, which is nearly normal and reaches 4.9 deviations."""


def open_weight_source(
    source: ModelSource, model: nn.Module, device: torch.device
) -> "SafetensorsReader | SyntheticReader":
    """What reads, or makes, the tensors of `model`, whose linears may be replaced already.

    Raises UserError for a missing or foreign file, and for a synthetic model whose vocabulary is
    smaller than that of the bundled tokenizer.
    """
    if source.kind != "synthetic":
        pinned = device.type == "cuda"
        return SafetensorsReader(source.path, aliases=tied_names(model), pin_memory=pinned)
    config = base_model(model).config
    text, known = config.get_text_config(), load_hf_config(source.tokenizer).vocab_size
    if text.vocab_size < known:
        raise UserError(
            f"model.source=synthetic: texts are cut by the bundled tokenizer, of {known} tokens, "
            f"and {source.name} has only {text.vocab_size}; take a model with a larger vocabulary."
        )
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    deviation = getattr(text, "initializer_range", 0.02)
    shapes = expected_shapes(model, packed=False)
    return SyntheticReader(shapes, dtype, device, deviation=deviation)


class SyntheticReader:
    """Stands where a `SafetensorsReader` would. `bytes_read` counts what it made; it is made where
    it is needed, so nothing is gained by making it `ahead`.

    shapes: of all tensors, by name. Matrices are nearly normal with `deviation`; of the vectors,
    those named `*bias` are zeros and the others, the weights of norms, ones.
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
        """All tensors, sorted."""
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
        """As of a `SafetensorsReader`; nothing can be amiss."""
        assert all(self._shapes[name] == tuple(shape) for name, shape in expected.items())
        return []

    def read(self, name: str, rows: Sequence[slice] | None = None) -> Tensor:
        """Tensor `name` on the device; of its rows only `rows`, one slice after the other."""
        shape = self._shapes[name]
        wanted = [slice(0, shape[0])] if rows is None else rows
        numbers = torch.cat([torch.arange(r.start, r.stop, device=self._device) for r in wanted])
        out = torch.empty(len(numbers), *shape[1:], dtype=self._dtype, device=self._device)
        if len(shape) == 1:
            out.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            self._fill(out.flatten(1), _key(self._seed, name), numbers)
        self.bytes_read += out.nbytes
        return out

    def _fill(self, out: Tensor, key: int, rows: Tensor) -> None:
        columns = _mixed(torch.arange(out.shape[1], device=out.device, dtype=torch.int32))
        keys = _mixed(rows.to(torch.int32) ^ key)
        step = max(1, _CHUNK.get(out.device.type, _CHUNK["cpu"]) // out.shape[1])
        for start in range(0, len(rows), step):
            bits = _mixed(keys[start : start + step, None] + columns)
            total = _sum_of_bytes(bits) + _sum_of_bytes(_mixed(bits + 0x3C6EF372))
            numbers = total.to(torch.float32) - _BYTES_MEAN
            out[start : start + step] = numbers * (self._deviation / _BYTES_DEVIATION)


def _key(seed: int, name: str) -> int:
    """31 bits of tensor `name`."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


def _mixed(x: Tensor) -> Tensor:
    """A permutation of int32 without pattern; x is a tensor of ours, which is written over.

    lowbias32 of Chris Wellons, hash-prospector.
    """
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32))):
        x = x.bitwise_xor_((x >> shift) & ((1 << (32 - shift)) - 1)).mul_(factor)
    return x.bitwise_xor_((x >> 16) & 0xFFFF)


def _sum_of_bytes(x: Tensor) -> Tensor:
    """Of int32, two bytes at a time."""
    pairs = (x & 0x00FF00FF) + ((x >> 8) & 0x00FF00FF)
    return (pairs & 0xFFFF) + (pairs >> 16)
