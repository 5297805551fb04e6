"""Refuse `from_config` for a configuration that says that the weights are quantized.

transformers would build a dense model with random weights, whose config.json nevertheless describes
quantized layers once it is saved. transformers itself calls `AutoModel.from_config` while it loads
models, so only the class for causal LMs refuses it. This module is imported before transformers is.
"""

from functools import wraps
from typing import Any


def extend_auto_class() -> None:
    """Let `AutoModelForCausalLM.from_config` refuse a `quantization_config` of hqqtrain."""
    from transformers.models.auto import modeling_auto

    auto_class: Any = modeling_auto.AutoModelForCausalLM
    build = auto_class.from_config.__func__  # the class method without its class

    @wraps(build)
    def from_config(cls: Any, config: Any, **kwargs: Any) -> Any:
        settings = getattr(config, "quantization_config", None) or {}
        settings = settings if isinstance(settings, dict) else vars(settings)
        if settings.get("quant_method") == "hqqtrain":
            from hqqtrain.common.errors import UserError

            raise UserError(
                "from_config: builds dense layers with random weights, but quantization_config "
                "says that hqqtrain has quantized them; use from_pretrained, or set "
                "config.quantization_config = None first."
            )
        return build(cls, config, **kwargs)

    auto_class.from_config = classmethod(from_config)
