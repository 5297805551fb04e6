"""hqqtrain: quantize language models to 8, 4, 3, 2 or 1 bit with HQQ and fine-tune them.

The import lets transformers and PEFT load models that hqqtrain has quantized. It takes no time: the
names below import torch and transformers when they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hqqtrain.integrations import register

if TYPE_CHECKING:
    from hqqtrain.api.adapters import add_lora
    from hqqtrain.api.data import collate_batch, load_data
    from hqqtrain.api.evaluation import evaluate
    from hqqtrain.api.export import export
    from hqqtrain.api.folders import load_quantized, save_quantized
    from hqqtrain.api.hqq_lora import load_hqq_lora
    from hqqtrain.api.hub import push_to_hub
    from hqqtrain.api.quantization import quantize_model
    from hqqtrain.api.training import train
    from hqqtrain.config.quant import QuantConfig
    from hqqtrain.generation.generator import generate
    from hqqtrain.inference.prepare import prepare_for_inference
    from hqqtrain.integrations.transformers import HqqTrainConfig
    from hqqtrain.nn.hqq_linear import HQQLinear

__version__ = "0.1.0"

__all__ = [
    "HQQLinear",
    "HqqTrainConfig",
    "QuantConfig",
    "__version__",
    "add_lora",
    "collate_batch",
    "evaluate",
    "export",
    "generate",
    "load_data",
    "load_hqq_lora",
    "load_quantized",
    "prepare_for_inference",
    "push_to_hub",
    "quantize_model",
    "save_quantized",
    "train",
]

_MODULES = {
    "HQQLinear": "hqqtrain.nn.hqq_linear",
    "HqqTrainConfig": "hqqtrain.integrations.transformers",
    "QuantConfig": "hqqtrain.config.quant",
    "add_lora": "hqqtrain.api.adapters",
    "collate_batch": "hqqtrain.api.data",
    "evaluate": "hqqtrain.api.evaluation",
    "export": "hqqtrain.api.export",
    "generate": "hqqtrain.generation.generator",
    "load_data": "hqqtrain.api.data",
    "load_hqq_lora": "hqqtrain.api.hqq_lora",
    "load_quantized": "hqqtrain.api.folders",
    "prepare_for_inference": "hqqtrain.inference.prepare",
    "push_to_hub": "hqqtrain.api.hub",
    "quantize_model": "hqqtrain.api.quantization",
    "save_quantized": "hqqtrain.api.folders",
    "train": "hqqtrain.api.training",
}
"""The module of each public name."""

register()


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
