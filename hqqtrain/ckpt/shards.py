"""Writing a stream of tensors as a Hugging Face checkpoint: shards of bounded size, an index.

The stream may be longer than memory: one shard is held at a time.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from hqqtrain.ckpt.atomic import atomic_write_json
from hqqtrain.models.reader import INDEX, SINGLE

MAX_SHARD_BYTES = 5_000_000_000


def write_shards(tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, *,
                 max_bytes: int = MAX_SHARD_BYTES) -> int:  # fmt: skip
    """Write `tensors` (name, tensor) into `folder`; returns the bytes of all tensors.

    One file is named model.safetensors; several get transformers' numbered names and an index.
    A tensor larger than `max_bytes` has a shard of its own.
    """
    weight_map: dict[str, int] = {}
    shard: dict[str, torch.Tensor] = {}
    count = size = total = 0
    for name, tensor in tensors:
        if name in weight_map:
            raise ValueError(f"tensor {name} comes twice")
        if shard and size + tensor.nbytes > max_bytes:
            _save(shard, folder, count)
            count, size, shard = count + 1, 0, {}
        weight_map[name], shard[name] = count, _owned(tensor)
        size, total = size + tensor.nbytes, total + tensor.nbytes
    _save(shard, folder, count)
    _name_shards(folder, weight_map, count + 1, total)
    return total


def _owned(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU and contiguous, in memory of its own: safetensors refuses shared storage."""
    tensor = tensor.detach().cpu().contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone()


def _save(shard: dict[str, torch.Tensor], folder: Path, number: int) -> None:
    save_file(shard, folder / f"shard-{number}", metadata={"format": "pt"})


def _name_shards(folder: Path, weight_map: dict[str, int], count: int, total: int) -> None:
    """The names carry the number of shards, which is known only at the end."""
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    names = names if count > 1 else [SINGLE]
    for number, name in enumerate(names):
        (folder / f"shard-{number}").rename(folder / name)
    if count > 1:
        index = {name: names[number] for name, number in sorted(weight_map.items())}
        atomic_write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
