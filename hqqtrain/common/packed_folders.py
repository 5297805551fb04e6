"""Find out which program has quantized the model in a folder, from names alone, without torch."""

import struct
from pathlib import Path
from typing import Any

from hqqtrain.common.reading import load_json, parse_json, read_json

OWN_METHOD = "hqqtrain"
"""Our own `quant_method` in config.json."""

FOREIGN_METHODS = ("hqq", "gptq", "awq", "auto-round", "compressed-tensors", "gguf")
"""The formats of other programs that can be read."""

HQQ_PICKLE = "qmodel.pt"
"""The file with the weights in hqq's own format."""

GGUF_SUFFIX = ".gguf"
"""The ending of the names of GGUF files."""

GGUF_ADAPTER = "adapter.gguf"
"""The file of an adapter beside an exported GGUF file."""

GPTQ_CONFIG = "quantize_config.json"
"""The file in which old tools of GPTQ recorded their settings."""

_MAX_HEADER_BYTES = 100_000_000
"""Largest header of a safetensors file, as the format defines it."""


def gguf_files(path: Path) -> list[Path]:
    """Return the GGUF file that `path` is, or the models that the folder `path` has, sorted."""
    if path.suffix == GGUF_SUFFIX and path.is_file():
        return [path]
    return sorted(file for file in path.glob(f"*{GGUF_SUFFIX}") if file.name != GGUF_ADAPTER)


def quantized_by(folder: Path) -> str | None:
    """Return the `quant_method` of the model in `folder`; None if its weights look dense.

    `folder` may also be a GGUF file. Some programs do not record their method in config.json, but
    their tensors have names of their own.
    A folder that cannot be read looks dense.
    """
    content = read_json(folder / "config.json")
    config = content.get("quantization_config")
    if isinstance(config, dict) and config:
        # MLX repeats its settings under a key of its own, without the name of a method.
        unnamed = "mlx" if "quantization" in content else "unknown"
        return str(config.get("quant_method", unnamed)).lower()
    names = _tensor_names(folder)
    if names is None:
        if (folder / HQQ_PICKLE).is_file():
            return "hqq"
        return "gguf" if gguf_files(folder) else None
    if any(name.endswith(".W_q") for name in names):
        return "hqq"
    is_gptq = any(name.endswith(".qweight") for name in names) and (folder / GPTQ_CONFIG).is_file()
    return "gptq" if is_gptq else None


def is_quantized(folder: Path) -> bool:
    """Whether the model in `folder` has weights that are loaded as they are quantized."""
    return quantized_by(folder) in (OWN_METHOD, *FOREIGN_METHODS)


def _tensor_names(folder: Path) -> list[str] | None:
    """Return the names of the tensors in safetensors files; None if there is no such file."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    try:
        if single.is_file():
            return list(_header(single))
        return list(load_json(index)["weight_map"]) if index.is_file() else None
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return []


def _header(path: Path) -> dict[str, Any]:
    """Return the header of a safetensors file."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = parse_json(file.read(min(length, _MAX_HEADER_BYTES)))
    return header if isinstance(header, dict) else {}
