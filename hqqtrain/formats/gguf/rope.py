"""The rotary embedding in GGUF: its base, and how it is scaled to longer texts."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hqqtrain.formats.gguf.package import import_gguf

_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
"""The values of `rope_type` that llama.cpp has."""

_FULL, _SLIDING = "full_attention", "sliding_attention"


def rope_parameters(config: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the parameters of layers that see all tokens, and those of layers with a window.

    The second is None if the layers do not differ.
    """
    parameters = config.rope_parameters
    if _FULL in parameters or _SLIDING in parameters:
        sliding = parameters.get(_SLIDING)
        return parameters.get(_FULL) or sliding, sliding
    return parameters, None


def rope_refusals(config: Any) -> Iterator[str]:
    """Yield why llama.cpp has no such rotary embedding."""
    full, sliding = rope_parameters(config)
    if full["rope_type"] not in _TYPES:
        yield f"llama.cpp has no rotary embedding of the type {full['rope_type']}"
    if sliding and sliding["rope_type"] != "default":
        yield f"llama.cpp scales no layers with a window ({sliding['rope_type']})"


def rotary_dim(config: Any, head_dim: int) -> int:
    """Return the number of values of a head that are rotated."""
    return int(head_dim * rope_parameters(config)[0].get("partial_rotary_factor", 1.0))


def write_rope(writer: Any, config: Any, head_dim: int) -> None:
    """Add the keys of the rotary embedding to a `GGUFWriter`."""
    kinds = import_gguf().RopeScalingType
    full, sliding = rope_parameters(config)
    writer.add_rope_dimension_count(rotary_dim(config, head_dim))
    writer.add_rope_freq_base(full["rope_theta"])
    if sliding:
        writer.add_rope_freq_base_swa(sliding["rope_theta"])
    kind = full["rope_type"]
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(kinds(kind))
        writer.add_rope_scaling_factor(full["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(_original_length(config, full))
        _add_given(writer.add_rope_scaling_yarn_attn_factor, full.get("attention_factor"))
        _add_given(writer.add_rope_scaling_yarn_beta_fast, full.get("beta_fast"))
        _add_given(writer.add_rope_scaling_yarn_beta_slow, full.get("beta_slow"))
    if kind == "longrope":
        writer.add_rope_scaling_type(kinds.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(_original_length(config, full))
        writer.add_rope_scaling_attn_factors(_longrope_attention(config, full))


def rope_tensors(config: Any, head_dim: int) -> dict[str, Tensor]:
    """Return the tensors that divide the frequencies, by their names in GGUF, fp32 [dim / 2]."""
    full, _ = rope_parameters(config)
    if full["rope_type"] == "llama3":
        dim = rotary_dim(config, head_dim)
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        unscaled = full["rope_theta"] ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        return {"rope_freqs.weight": (unscaled / scaled.double()).float()}
    if full["rope_type"] == "longrope":
        return {
            f"rope_factors_{length}.weight": torch.tensor(full[f"{length}_factor"]).float()
            for length in ("long", "short")
        }
    return {}


def _original_length(config: Any, parameters: dict[str, Any]) -> int:
    length = parameters.get("original_max_position_embeddings")
    return length or config.max_position_embeddings


def _longrope_attention(config: Any, parameters: dict[str, Any]) -> float:
    """Return the factor of the attention's logits, as transformers computes it."""
    if (given := parameters.get("attention_factor")) is not None:
        return given
    original = _original_length(config, parameters)
    factor = parameters.get("factor") or config.max_position_embeddings / original
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def _add_given(add: Any, value: float | None) -> None:
    if value is not None:
        add(value)
