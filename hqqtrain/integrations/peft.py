"""Let PEFT put its adapters on `HQQLinear`, also with a stock `LoraConfig`.

This module is imported while PEFT is, so it imports the rest of hqqtrain only when it is called.
"""

from typing import Any

from peft.tuners import tuners_utils
from peft.tuners.lora import model as lora_model
from torch import nn

from hqqtrain.compat import add_lora_dispatcher, extend_all_linear


def extend_peft() -> None:
    """Let PEFT know `HQQLinear`: as a layer for LoRA, and as one of `all-linear`."""
    add_lora_dispatcher(lora_model, _lora_layer)
    extend_all_linear(tuners_utils, _is_hqq_linear)


def _is_hqq_linear(module: nn.Module) -> bool:
    from hqqtrain.nn.hqq_linear import HQQLinear

    return isinstance(module, HQQLinear)


def _lora_layer(target: Any, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module | None:
    """Return PEFT's layer around an `HQQLinear`; None: `target` is another module."""
    is_adapted = isinstance(target, tuners_utils.BaseTunerLayer)
    if not _is_hqq_linear(target.get_base_layer() if is_adapted else target):
        return None
    from hqqtrain.nn.lora import HQQLoraLinear

    return HQQLoraLinear(target, adapter_name, config=config, **kwargs)
