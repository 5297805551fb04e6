"""Convert a pickle of hqq to safetensors files: a program that runs as a process of its own.

It reads `qmodel.pt`, and the file of `PeftUtils.save_lora_weights`.

This is the only place where a pickle is read. torch's reader of weights (`weights_only`) builds
tensors and plain values, and refuses everything else. Memory, time and the size of the files are
limited, because a small file can describe a large result. Nothing of hqqtrain is imported, so that
the limit of memory covers as little as possible.

    python unpickle.py FILE FOLDER MEMORY_BYTES FILE_BYTES CPU_SECONDS
"""

import json
import re
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

MAX_FILE_BYTES = 4 << 30
"""Bytes of tensors after which another file is begun."""


def main(source: str, folder: str, memory: str, file_bytes: str, cpu_seconds: str) -> None:
    """Read `source` and write its tensors, under the names that hqq's safetensors form has.

    Args:
        source: The file.
        folder: The folder to write to.
        memory: Bytes of memory that may be allocated in addition to what the process has.
        file_bytes: Bytes that all tensors may have.
        cpu_seconds: Seconds that the process may compute.

    Raises:
        ValueError: The file has another structure.
    """
    _limit(resource.RLIMIT_AS, _address_space() + int(memory))
    _limit(resource.RLIMIT_FSIZE, int(file_bytes))
    _limit(resource.RLIMIT_CPU, int(cpu_seconds))
    weights = torch.load(source, map_location="cpu", weights_only=True, mmap=True)  # noqa: TID251
    if isinstance(weights, dict) and weights.keys() == {"peft_config", "parameters"}:
        weights = weights["parameters"]  # the file of an adapter
    tensors = _named_tensors(weights)
    if sum(tensor.nbytes for tensor in tensors.values()) > int(file_bytes):
        raise ValueError("its tensors are larger than the file")
    _save(tensors, Path(folder))


def _named_tensors(weights: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of {module: {attribute: value}}, with numbers and texts as tensors."""
    if not isinstance(weights, dict):
        raise ValueError("it does not contain a dict of modules")
    tensors = {}
    for module, state in weights.items():
        if not isinstance(module, str) or not isinstance(state, dict):
            raise ValueError(f"{module!r:.60} is not a module with a dict of values")
        for attribute, value in state.items():
            if (tensor := _as_tensor(value)) is not None:
                tensors[f"{module}.{attribute}" if module else str(attribute)] = tensor
    return tensors


def _as_tensor(value: Any) -> torch.Tensor | None:
    """Return a value as hqq's safetensors form has it; None if the form has no such value."""
    match value:
        case torch.Tensor():
            if value.layout != torch.strided or value.is_quantized:
                raise ValueError("it contains a tensor that is not a plain one")
            return value.detach()
        case torch.Size():
            return torch.tensor(value, dtype=torch.int64)
        case bool():
            return torch.tensor(int(value), dtype=torch.uint8)
        case int():
            return torch.tensor(value, dtype=torch.int32)
        case float():
            return torch.tensor(value, dtype=torch.float32)
        case torch.dtype():
            return _as_tensor(str(value))
        case str() if value.isascii():
            return torch.tensor(list(value.encode()), dtype=torch.uint8)
    return None


def _save(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Write files of about `MAX_FILE_BYTES`, and an index."""
    files: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > MAX_FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(name)
        size += tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files, 1):
        file_name = f"model-{number:05}-of-{len(files):05}.safetensors"
        # A clone has its own memory, as the format demands; tied tensors share theirs.
        save_file({name: tensors[name].clone().contiguous() for name in names}, folder / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")


def _limit(which: int, value: int) -> None:
    """Set a limit of this process, unless it is lower already."""
    _, hard = resource.getrlimit(which)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))


def _address_space() -> int:
    """Return the bytes of addresses that the process uses; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError):
        return 1 << 36
    return pages * resource.getpagesize()


def _reason(error: Exception) -> str:
    """Return one line on an error, without torch's advice to trust the file."""
    text = " ".join(str(error).split())
    if called := re.search(r"GLOBAL (\S+)", text):
        return f"it contains {called[1]}, which is code and no weight"
    if text.startswith("Weights only load failed"):
        return "it contains more than weights"
    return f"{type(error).__name__}: {text[:200]}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        main(*sys.argv[1:])
    except MemoryError:
        sys.exit("reading it needs more memory than its size allows")
    except Exception as error:  # torch.load raises anything for a damaged file
        sys.exit(_reason(error))
