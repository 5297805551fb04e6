"""`add_lora`: put LoRA adapters on a quantized model."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from hqqtrain.api.arguments import checked_group, named_as_arguments
from hqqtrain.common.errors import UserError
from hqqtrain.config.adapter import AdapterConfig
from hqqtrain.config.groups import TrainConfig
from hqqtrain.config.public_function import public_function
from hqqtrain.nn.base_linears import base_linears
from hqqtrain.nn.lora import cast_adapters, init_adapters, lora_config, target_linears
from hqqtrain.nn.patterns import matching_modules
from hqqtrain.quant.spec import DTYPES

Value = TypeVar("Value", int, float)


@public_function(model=nn.Module)
def add_lora(
    model: PreTrainedModel,
    *,
    r: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = "*",
    modules_to_save: Sequence[str] = (),
    kind: str = "lora",
    init: str = "default",
    dtype: str = "fp32",
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    seed: int = 0,
) -> PeftModel:
    """Put a LoRA adapter on the quantized layers of a model, and freeze all else.

    The initial values depend on the seed and the names of the layers alone, and are those of a run
    with the same `train.seed`. `save_pretrained` of the result writes a stock PEFT adapter that
    records the fingerprint of its base.

    Args:
        model: A quantized model of transformers, without adapters; changed in place.
        r: The rank of the two matrices.
        alpha: The numerator of the scaling.
        dropout: The dropout probability on the input of the adapter.
        target_modules: Which quantized layers get an adapter: names such as `q_proj`, globs, or
            tags of hqq such as `self_attn.q_proj`; `all-linear`: all but the head; `*`: all.
        modules_to_save: Small modules to train in full, by name or glob.
        kind: `lora`, with the scaling alpha / r, or `rslora`, with alpha / sqrt(r).
        init: `default`, PEFT's, or `gaussian`.
        dtype: The dtype of the adapter, `fp32` or `bf16`.
        rank_pattern: Other ranks of single layers, by the same names, globs or tags. Later patterns
            take precedence.
        alpha_pattern: Other values of `alpha`, likewise.
        seed: The seed of the initial values.

    Returns:
        PEFT's model.

    Raises:
        UserError: A value is not allowed, a pattern selects nothing, or the model has no quantized
            layer or has adapters already.
    """
    with named_as_arguments("add_lora"):
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise UserError("model has an adapter already; train that one, or load the base again.")
        is_sequence = isinstance(target_modules, Sequence) and not isinstance(target_modules, str)
        targets = [*target_modules] if is_sequence else [target_modules]
        settings = {"r": r, "alpha": alpha, "dropout": dropout, "target_modules": targets,
                    "modules_to_save": [*modules_to_save], "kind": kind, "init": init,
                    "dtype": dtype}  # fmt: skip
        adapter = checked_group(AdapterConfig, "adapter", settings)
        checked_group(TrainConfig, "train", {"seed": seed})
        if kind == "none":
            raise UserError("adapter.kind=none: adds nothing; allowed are lora, rslora.")
        if not base_linears(model):
            raise UserError(
                "model has no quantized layer; call quantize_model first. On a dense model, use "
                "get_peft_model of PEFT."
            )
        linears = target_linears(adapter, model)
        config: Any = lora_config(adapter, model)
        config.rank_pattern = _by_layer("rank_pattern", rank_pattern, linears, int, at_least=1)
        config.alpha_pattern = _by_layer("alpha_pattern", alpha_pattern, linears, float, at_least=0)
        adapted = get_peft_model(model, config)
    cast_adapters(adapted, DTYPES[dtype])
    init_adapters(adapted, seed, init, _copy)
    return adapted


@torch.no_grad()
def _copy(param: nn.Parameter, values: Tensor) -> None:
    param.copy_(values)


def _by_layer(
    argument: str, patterns: Mapping[str, Value] | None, linears: Sequence[str], kind: type[Value],
    *, at_least: int,
) -> dict[str, Value]:  # fmt: skip
    """Return the value of each layer that a pattern selects, by its full name.

    Raises:
        UserError: A pattern selects nothing, or a value is of another kind or too small.
    """
    if not isinstance(patterns, Mapping | None):
        raise UserError(f"{argument}={patterns}: must map patterns to values.")
    found: dict[str, Value] = {}
    for pattern, value in (patterns or {}).items():
        is_number = type(value) in (int, kind) and math.isfinite(value)
        if not is_number or value < at_least:
            what = "an integer" if kind is int else "a number"
            raise UserError(f"{argument}[{pattern}]={value}: must be {what}, at least {at_least}.")
        selected = matching_modules(argument, [pattern], linears, "target of the adapter")
        found |= dict.fromkeys(selected, value)
    return found
