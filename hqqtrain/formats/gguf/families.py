"""The families of models that llama.cpp knows and whose metadata we write ourselves."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hqqtrain.formats.gguf.rope import rope_refusals
from hqqtrain.formats.quantized_settings import QuantizedSettings

_GELU = ("gelu_pytorch_tanh", "gelu")
"""Names of the GELU of llama.cpp, also as configurations of Gemma write it."""


@dataclass(frozen=True)
class Family:
    """The demands of llama.cpp on the models of a family.

    Attributes:
        architecture: Its name in llama.cpp.
        permutes_heads: Whether the rows of q and k are in the order of the original Llama.
        norm_offset: What is added to the weights of norms.
        activations: The values of the configuration for the function that llama.cpp computes.
        has_head: Whether the head may be a tensor of its own.
        window_period: Every layer with a number that is a multiple of this sees all tokens, the
            others see a window of them; 0: llama.cpp lets all layers see all tokens.
        scales_of_27b: The number of layers with which llama.cpp scales queries by the width of the
            model, as in Gemma's 27B, and not by that of a head.
    """

    architecture: str
    permutes_heads: bool = False
    norm_offset: float = 0.0
    activations: tuple[str, ...] = ("silu",)
    has_head: bool = True
    window_period: int = 0
    scales_of_27b: int = 0


FAMILIES = {
    "llama": Family("llama", permutes_heads=True),
    "mistral": Family("llama", permutes_heads=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "phi3": Family("phi3"),
    "gemma": Family("gemma", norm_offset=1.0, activations=_GELU, has_head=False),
    "gemma2": Family(
        "gemma2", norm_offset=1.0, activations=_GELU, has_head=False, window_period=2,
        scales_of_27b=46,
    ),
    "gemma3_text": Family(
        "gemma3", norm_offset=1.0, activations=_GELU, window_period=6, scales_of_27b=62
    ),
}  # fmt: skip
"""The families, by the `model_type` of Hugging Face."""


def head_dim(config: Any) -> int:
    """Return the number of values of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def family_refusals(config: Any, settings: QuantizedSettings) -> Iterator[str]:
    """Yield why we cannot write the metadata of a model with this configuration."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        yield (
            f"{config.model_type} is none of the families {', '.join(FAMILIES)}; for others, set "
            "export.llama_cpp to the folder of llama.cpp, whose converter then writes the metadata"
        )
        return
    yield from rope_refusals(config)
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in family.activations:
        yield f"llama.cpp has no {activation} in {config.model_type}"
    if not family.has_head and "lm_head" in settings.modules:
        yield (
            f"llama.cpp takes the embedding for the head of {config.model_type}, and this head is "
            "quantized; leave lm_head in quant.skip"
        )
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if scalar is not None and scalar != _query_scalar(config, family):
        yield (
            f"query_pre_attn_scalar={scalar:g}, for which llama.cpp has "
            f"{_query_scalar(config, family):g}"
        )


def _query_scalar(config: Any, family: Family) -> float:
    """Return the number by whose root llama.cpp divides the queries of Gemma."""
    if config.num_hidden_layers == family.scales_of_27b:
        return config.hidden_size // config.num_attention_heads
    return head_dim(config)
