"""The metadata of a GGUF file: the architecture of the model, and where it comes from."""

import logging
from typing import Any

from hqqtrain.formats.gguf.families import FAMILIES, Family, head_dim
from hqqtrain.formats.gguf.rope import write_rope

logger = logging.getLogger(__name__)

FINGERPRINT = "general.hqqtrain.fingerprint"
"""Key of the fingerprint of the quantized model that was exported."""

_FILE_TYPES = {"F16": 1, "Q4_1": 3, "Q8_0": 7, "Q2_K": 10, "Q4_K": 14}
"""`general.file_type` of llama.cpp, which programs show, by the type of most weights."""


def write_general(writer: Any, *, name: str, fingerprint: str, main_type: str) -> None:
    """Add the keys `general.*` to a `GGUFWriter`.

    Args:
        writer: The writer.
        name: The name of the model.
        fingerprint: The fingerprint of the quantized model; empty: nothing is quantized.
        main_type: The type of most weights.
    """
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(_FILE_TYPES[main_type])
    writer.add_quantization_version(2)
    if fingerprint:
        writer.add_string(FINGERPRINT, fingerprint)


def write_architecture(writer: Any, config: Any) -> None:
    """Add the keys of the architecture to a `GGUFWriter`.

    Args:
        writer: The writer, made for the architecture of the family.
        config: The configuration of a model of `FAMILIES`.
    """
    family, dim = FAMILIES[config.model_type], head_dim(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads or config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    write_rope(writer, config, dim)
    if cap := getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(cap)
    if cap := getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(cap)
    _write_windows(writer, config, family)


def _write_windows(writer: Any, config: Any, family: Family) -> None:
    """Add which layers see a window of the tokens, or warn that llama.cpp lets all see all."""
    window = getattr(config, "sliding_window", None)
    if family.architecture == "phi3":
        writer.add_sliding_window(0)  # llama.cpp needs the key, and has no windows of Phi
    if not window or not getattr(config, "use_sliding_window", True):
        return
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    windowed = [kind == "sliding_attention" for kind in kinds]
    if not family.window_period:
        if window < config.max_position_embeddings and any(windowed):
            logger.warning(
                "export.format=gguf: llama.cpp has no attention windows in %s. Texts longer than "
                "%d tokens give other results there.", config.model_type, window,
            )  # fmt: skip
        return
    if any(windowed):
        writer.add_sliding_window(window)
        usual = [(i + 1) % family.window_period != 0 for i in range(len(windowed))]
        if windowed != usual:
            writer.add_sliding_window_pattern(windowed)
