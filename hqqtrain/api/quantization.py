"""`quantize_model`: quantize a model that is in memory."""

from dataclasses import fields
from typing import Any, TypedDict, Unpack

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from hqqtrain.api.arguments import named_as_arguments
from hqqtrain.common.errors import UserError
from hqqtrain.config.public_function import public_function
from hqqtrain.config.quant import QuantConfig
from hqqtrain.integrations.transformers import SETTINGS, HqqTrainConfig, quantize_in_memory
from hqqtrain.models.offload import offload_meta
from hqqtrain.nn import replace
from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain.nn.replace import QuantizationReport

_TAKEN = (*SETTINGS, "offload_meta")
"""The keys of the group `quant` that `quantize_model` takes."""


class QuantSettings(TypedDict, total=False):
    """The settings of a quantization without text, as in the group `quant` of a run."""

    nbits: int
    group_size: int | None
    axis: int
    solver: str
    zero: str
    meta_dtype: str
    offload_meta: bool
    skip: list[str]
    overrides: dict[str, Any]


@public_function(model=nn.Module)
def quantize_model(
    model: nn.Module, config: QuantConfig | None = None, **settings: Unpack[QuantSettings]
) -> QuantizationReport:
    """Quantize the linear layers of a model in place, without text.

    Each becomes an `HQQLinear`, which is frozen. The dense weights are freed one after the other. A
    model of transformers can be saved afterwards, with `save_quantized` or `save_pretrained`.

    Args:
        model: A dense model of transformers, or any other module with `nn.Linear`s, in memory.
        config: How to quantize. Its keys for files, backends and calibration must have their
            defaults.
        settings: The same as keywords, in place of `config`: `nbits` (4), `group_size` (64), `axis`
            (1), `solver`, `zero`, `meta_dtype`, `skip`, `overrides` and `offload_meta` (False).

    Returns:
        What was quantized, with which settings, and what was not.

    Raises:
        UserError: A setting is not allowed or selects nothing, a solver needs text, the model is
            quantized already or has adapters, or a weight contains NaN or infinity. After the last
            one, some layers are quantized: load the model again.
    """
    # Tensors that are made in inference mode cannot be trained through.
    with torch.inference_mode(False), named_as_arguments("quantize_model"):
        _check_is_dense(model)
        if not isinstance(config, QuantConfig | None):
            raise UserError(
                f"config is a {type(config).__name__}; give a QuantConfig, or keywords."
            )
        if config is not None and settings:
            raise UserError(
                f"config and {', '.join(settings)} are given; give one QuantConfig, or keywords."
            )
        chosen = HqqTrainConfig(**(_settings_of(config) if config else dict(settings)))
        if isinstance(model, PreTrainedModel):
            return quantize_in_memory(model, chosen)
        report = replace.quantize_model(model, chosen.quant_config())
        if chosen.offload_meta:
            offload_meta(model)
        return report


def _settings_of(config: QuantConfig) -> dict[str, Any]:
    """Return the settings of `config` that this function takes.

    Raises:
        UserError: It has others.
    """
    default = QuantConfig()
    for item in fields(config):
        value = getattr(config, item.name)
        if item.name in _TAKEN or value == getattr(default, item.name) or value is None:
            continue
        advice = {
            "calibration": "quantize_model has no text; calibrate with the command line, "
            "task=quantize, and load its quantized/ with load_quantized",
            "compute_dtype": "cast the model with model.to(dtype) first",
            "backend": "call hqqtrain_kernels.backend.set_backend, which sets it for all models, "
            "or prepare_for_inference with the kernels of another package",
        }.get(item.name, "only the command line, task=quantize, uses it")
        raise UserError(f"quant.{item.name}={value}: has no effect here; {advice}.")
    return {name: getattr(config, name) for name in _TAKEN}


def _check_is_dense(model: nn.Module) -> None:
    """Check that no layer is quantized or has an adapter."""
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise UserError("model has adapters; quantize it first, and then call add_lora.")
    config = getattr(model, "config", None)
    is_quantized = getattr(config, "quantization_config", None) is not None
    if is_quantized or any(isinstance(module, HQQLinear) for module in model.modules()):
        raise UserError("model is quantized already; load it in full precision.")
