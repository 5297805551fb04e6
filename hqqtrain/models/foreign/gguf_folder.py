"""Make a folder of a GGUF file, with its configuration, its tokenizer and the list of its tensors.

The folder is made once, in the user's cache, under the digest of the file. It contains no weights:
`gguf_reader.py` reads these from the file itself. transformers reads the configuration and the
tokenizer, and the package `gguf` the list.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from hqqtrain.common.errors import UserError, describe_error
from hqqtrain.common.files import atomic_write_json
from hqqtrain.common.packed_folders import gguf_files
from hqqtrain.common.reading import load_json
from hqqtrain.models.foreign.base import AGAIN
from hqqtrain.models.foreign.converted import converted
from hqqtrain.models.foreign.gguf_rope import llama3_parameters

INDEX = "gguf_tensors.json"
"""The list of tensors: name of transformers -> `offset` in the file, `shape`, `type` and `heads`.

The rows of a tensor with `heads` are in another order; see `gguf_reader.py`.
"""

_FORMAT_VERSION = 1
"""Changes whenever folders of this version would be made in another way."""

_MODULES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
"""Modules of a decoder layer by their names in GGUF."""

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""The architectures whose tensors have these names, and the meaning that transformers gives them.

Mistral and SmolLM are `llama`.
"""

_REORDERED = ("llama",)
"""Architectures that have the rows of each head in another order in GGUF, for queries and keys."""

_ROPE_FACTORS = "rope_freqs.weight"
"""A table that transformers computes from the configuration."""


def prepared_folder(file: Path) -> Path:
    """Return the folder for a GGUF file, from the cache or newly made.

    Args:
        file: The file. A `config.json` next to it takes precedence over its own metadata.

    Raises:
        UserError: The file is damaged, or of a kind that cannot be taken over, or the cache cannot
            be written to.
    """
    config = file.parent / "config.json"
    names = [file.name, *([config.name] if config.is_file() else [])]
    return converted(
        f"{_FORMAT_VERSION}-{file.stem}", file.parent, names,
        lambda folder, digest: _write(file, folder, digest),
    )  # fmt: skip


def the_gguf_file(path: Path) -> Path:
    """Return the GGUF file that `path` is, or the only one that the folder `path` has.

    Raises:
        UserError: The folder has several.
    """
    files = gguf_files(path)
    if len(files) != 1:
        raise UserError(
            f"model.name_or_path={path}: has {len(files)} GGUF files; name one of them, such as "
            f"{files[0]}."
        )
    return files[0]


def _write(file: Path, folder: Path, digest: str) -> None:
    """Write the files of the folder."""
    reader = _open(file)
    architecture = _field(reader, "general.architecture")
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{file}: has the architecture {architecture}. Those that can be taken over are "
            f"{', '.join(ARCHITECTURES)}; use the safetensors files of this model."
        )
    if (_field(reader, "split.count") or 1) > 1:
        raise UserError(f"{file}: is one of several parts; merge them (llama-gguf-split --merge).")
    own_config = file.parent / "config.json"
    config = _config_json(file, reader, own_config)
    heads = _heads(file, config)
    index = {
        "file": digest,
        "tensors": dict(
            _entry(tensor, architecture, heads)
            for tensor in reader.tensors
            if tensor.name != _ROPE_FACTORS
        ),
    }
    if not any((file.parent / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        _call(file, "its tokenizer", AutoTokenizer).save_pretrained(folder)
    atomic_write_json(folder / INDEX, index)
    atomic_write_json(folder / "config.json", config)


def _heads(file: Path, config: Mapping[str, Any]) -> dict[str, int]:
    """Return the number of heads by module of GGUF, for modules whose rows belong to heads."""
    query = config.get("num_attention_heads")
    key = config.get("num_key_value_heads") or query
    for count in (query, key):
        if not isinstance(count, int) or count < 1:
            raise UserError(f"{file}: its configuration has {count!r} attention heads; {AGAIN}")
    return {"attn_q": int(query or 0), "attn_k": int(key or 0)}


def _open(file: Path) -> Any:
    """Return the package's reader of the file."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError(
            f"{file}: GGUF files are read with the package gguf, which is not installed: "
            "pip install 'hqqtrain[gguf]'."
        ) from error
    try:
        return GGUFReader(file)
    except Exception as error:  # the package raises anything for a damaged file
        raise UserError(
            f"{file}: not a complete GGUF file ({describe_error(error)}). Download it again."
        ) from error


def _field(reader: Any, name: str) -> Any:
    field = reader.get_field(name)
    return field and field.contents()


def _config_json(file: Path, reader: Any, own: Path) -> dict[str, Any]:
    """Return config.json of the model: the user's own, or what transformers makes of the file."""
    if own.is_file():
        try:
            config = dict(load_json(own))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{own}: is not a JSON object ({error}).") from error
    else:
        config = _call(file, "its configuration", AutoConfig).to_dict()
        rope = config.get("rope_parameters") or {}
        config["rope_parameters"] = _rope_parameters(file, reader, rope)
    return {**config, "quantization_config": {"quant_method": "gguf"}}


def _rope_parameters(file: Path, reader: Any, rope: dict[str, Any]) -> dict[str, Any]:
    """Return `rope_parameters` with the scaling of the file, if any."""
    scaled: dict[str, Any] | None = rope
    if factors := [tensor.data for tensor in reader.tensors if tensor.name == _ROPE_FACTORS]:
        scaled = llama3_parameters(factors[0], rope)
    kind = _field(reader, f"{_field(reader, 'general.architecture')}.rope.scaling.type")
    if scaled is None or kind not in (None, "none"):
        raise UserError(
            f"{file}: scales its positions in a way that is not read from GGUF. Put the "
            "config.json of the original model into the same folder."
        )
    return scaled


def _call(file: Path, part: str, auto_class: Any) -> Any:
    """Let transformers read a part of the file."""
    load: Callable[..., Any] = auto_class.from_pretrained
    try:
        return load(file.parent, gguf_file=file.name, local_files_only=True)
    except Exception as error:  # transformers raises anything
        raise UserError(
            f"{file}: transformers cannot read {part} ({describe_error(error)}). Put config.json "
            "and the tokenizer's files of the original model into the same folder."
        ) from error


def _entry(
    tensor: Any, architecture: str, heads: Mapping[str, int]
) -> tuple[str, Mapping[str, Any]]:
    """Return the name of a tensor in transformers, and its entry of the list."""
    name, module = tensor.name, ""
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        number, module, attribute = match.groups()
        if module in _MODULES:
            name = f"model.layers.{number}.{_MODULES[module]}.{attribute}"
    elif (outer := name.removesuffix(".weight")) in _OUTER:
        name = f"{_OUTER[outer]}.weight"
    return name, {
        "offset": int(tensor.data_offset),
        "shape": [int(size) for size in reversed(tensor.shape)],
        "type": tensor.tensor_type.name,
        "heads": heads.get(module, 0) if architecture in _REORDERED else 0,
    }
