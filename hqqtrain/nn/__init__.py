"""Modules: the packed linear layer, LoRA on it, and replacing the linears of a model."""

from hqqtrain.nn.hqq_linear import PACKED, HQQLinear
from hqqtrain.nn.lora import (
    HQQLoraLinear,
    cast_adapters,
    init_adapters,
    lora_config,
    with_packed_linears,
)
from hqqtrain.nn.replace import Report, choose, quantize_model, replace_linears

__all__ = [
    "PACKED", "HQQLinear", "HQQLoraLinear", "Report", "cast_adapters", "choose", "init_adapters",
    "lora_config", "quantize_model", "replace_linears", "with_packed_linears",
]  # fmt: skip
