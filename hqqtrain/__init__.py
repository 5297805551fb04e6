"""hqqtrain: quantize language models to 8, 4, 3, 2 or 1 bit with HQQ and fine-tune them.

The import lets transformers and PEFT load models that hqqtrain has quantized. It takes no time: the
names below import torch and transformers when they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hqqtrain.integrations import register

if TYPE_CHECKING:
    from hqqtrain.generation.generator import generate
    from hqqtrain.inference.prepare import prepare_for_inference
    from hqqtrain.integrations.transformers import HqqTrainConfig
    from hqqtrain.nn.hqq_linear import HQQLinear

__version__ = "0.1.0"

__all__ = ["HQQLinear", "HqqTrainConfig", "__version__", "generate", "prepare_for_inference"]

_MODULES = {
    "HQQLinear": "hqqtrain.nn.hqq_linear",
    "HqqTrainConfig": "hqqtrain.integrations.transformers",
    "generate": "hqqtrain.generation.generator",
    "prepare_for_inference": "hqqtrain.inference.prepare",
}
"""The module of each public name."""

register()


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
