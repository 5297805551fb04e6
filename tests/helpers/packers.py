"""Write layers as other programs pack them, in plain Python, and what they stand for."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


def words(rows: Tensor, nbits: int) -> Tensor:
    """Return each row of codes as one long number, cut into 32-bit words: int32 [n, words]."""
    return _as_int32([_cut(sum(int(c) << nbits * i for i, c in enumerate(row)), len(row) * nbits)
                      for row in rows])  # fmt: skip


def words_minus_one(rows: Tensor, nbits: int) -> Tensor:
    """Return the words of codes minus 1; within a word, a code of 0 borrows from the next one."""
    if nbits == 3:
        return words((rows - 1) % 8, 3)
    ones = sum(1 << shift for shift in range(0, 32, nbits))
    packed = [[(int(w) - ones) % (1 << 32) for w in row] for row in words(rows, nbits)]
    return _as_int32(packed)


def awq_words(rows: Tensor) -> Tensor:
    """Return each row of 4-bit codes as AWQ's words: columns 0, 2, 4, 6, 1, 3, 5, 7 of eight."""
    order = [first + i for first in range(0, rows.shape[1], 8) for i in (0, 2, 4, 6, 1, 3, 5, 7)]
    return words(rows[:, order], 4)


def _cut(number: int, bits: int) -> list[int]:
    return [number >> start & 0xFFFFFFFF for start in range(0, bits, 32)]


def _as_int32(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64).to(torch.int32)


@dataclass
class PlainWeight:
    """Codes [out, in], scales [out, groups] and integer zeros [out, groups] of a weight."""

    codes: Tensor
    scale: Tensor
    zero: Tensor

    @property
    def dequantized(self) -> Tensor:
        """The weight, computed in fp32 and rounded to the dtype of the scales."""
        groups = self.codes.float().unflatten(1, (self.scale.shape[1], -1))
        weight = (groups - self.zero.float()[..., None]) * self.scale.float()[..., None]
        return weight.flatten(1).to(self.scale.dtype)


def random_weight(
    nbits: int, out: int = 64, columns: int = 64, groups: int = 2, *,
    zero: int | None = None, dtype: torch.dtype = torch.float16,
) -> PlainWeight:  # fmt: skip
    """Return a random weight, whose zeros are all `zero` if that is given."""
    generator = torch.Generator().manual_seed(nbits)
    codes = torch.randint(0, 1 << nbits, (out, columns), generator=generator)
    scale = torch.rand(out, groups, generator=generator).add(0.1).to(dtype)
    zeros = torch.randint(0, 1 << nbits, (out, groups), generator=generator)
    return PlainWeight(codes, scale, zeros if zero is None else torch.full_like(zeros, zero))


def gptq_tensors(weight: PlainWeight, nbits: int, *, version: int = 1) -> dict[str, Tensor]:
    """Return the tensors of a layer as GPTQ's tools store it."""
    pack_zeros = words_minus_one if version == 1 else words
    return {
        "qweight": words(weight.codes, nbits).t(),
        "qzeros": pack_zeros(weight.zero.t(), nbits),
        "scales": weight.scale.t(),
        "g_idx": torch.arange(weight.codes.shape[1], dtype=torch.int32)
        // (weight.codes.shape[1] // weight.scale.shape[1]),
    }


def awq_tensors(weight: PlainWeight) -> dict[str, Tensor]:
    """Return the tensors of a layer as AWQ's tools store it."""
    return {"qweight": awq_words(weight.codes.t()), "qzeros": awq_words(weight.zero.t()),
            "scales": weight.scale.t()}  # fmt: skip


def compressed_tensors(weight: PlainWeight, nbits: int, zeros: str) -> dict[str, Tensor]:
    """Return the tensors of a layer as compressed-tensors stores it, its zeros as `zeros` says."""
    tensors = {
        "weight_packed": words(weight.codes, nbits),
        "weight_scale": weight.scale,
        "weight_shape": torch.tensor(weight.codes.shape),
    }
    if zeros == "packed":
        tensors["weight_zero_point"] = words(weight.zero.t(), nbits).t()
    elif zeros == "plain":
        tensors["weight_zero_point"] = (weight.zero - (1 << nbits - 1)).to(torch.int8)
    return tensors


def save_layers(folder: Path, layers: dict[str, dict[str, Tensor]], config: dict) -> Path:
    """Write a checkpoint with these layers, and config.json with this quantization_config."""
    folder.mkdir(exist_ok=True)
    tensors = {f"{module}.{key}": tensor.contiguous()
               for module, layer in layers.items() for key, tensor in layer.items()}  # fmt: skip
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return folder
