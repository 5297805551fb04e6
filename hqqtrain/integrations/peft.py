"""Let PEFT put its adapters on `HQQLinear`, also with a stock `LoraConfig`.

This module is imported while PEFT is, so it imports the rest of hqqtrain only when it is called.
"""

from typing import Any

from peft.tuners import tuners_utils
from peft.tuners.lora import model as lora_model
from torch import nn

from hqqtrain.compat import add_lora_dispatcher, extend_all_linear

_INITS = (True, False, None, "gaussian", "eva")
"""Values of `init_lora_weights` with which PEFT does not compute with the weights of the base."""


def extend_peft() -> None:
    """Let PEFT know `HQQLinear`: as a layer for LoRA, and as one of `all-linear`."""
    add_lora_dispatcher(lora_model, _lora_layer)
    extend_all_linear(tuners_utils, _is_hqq_linear)


def _is_hqq_linear(module: nn.Module) -> bool:
    from hqqtrain.nn.hqq_linear import HQQLinear

    return isinstance(module, HQQLinear)


def _lora_layer(target: Any, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module | None:
    """Return PEFT's layer around an `HQQLinear`; None: `target` is another module.

    Raises:
        UserError: The initial values depend on the weights of the base, which are packed.
    """
    is_adapted = isinstance(target, tuners_utils.BaseTunerLayer)
    if not _is_hqq_linear(target.get_base_layer() if is_adapted else target):
        return None
    from hqqtrain.common.errors import UserError
    from hqqtrain.nn.lora import HQQLoraLinear

    init = config.init_lora_weights
    if (init.lower() if isinstance(init, str) else init) not in _INITS:
        raise UserError(
            f"LoraConfig: init_lora_weights={init!r}: PEFT computes it from the weights of the "
            "base, which are packed; allowed on a model quantized by hqqtrain are "
            f"{', '.join(map(repr, _INITS))}."
        )

    return HQQLoraLinear(target, adapter_name, config=config, **kwargs)
