"""PEFT's module says at each call whether it still is a plain linear with one adapter."""

from peft import LoraConfig, get_peft_model
from torch import nn

from hqqtrain.nn.lora_blocks.adapted_linear import (
    AdaptedLinear,
    adapted_linear,
)


def lora_module(**options) -> nn.Module:
    model = get_peft_model(
        nn.Sequential(nn.Linear(4, 6)), LoraConfig(r=2, target_modules=["0"], **options)
    )
    return model.base_model.model[0]


def linear_of(module: nn.Module) -> AdaptedLinear:
    linear = adapted_linear(module)
    assert isinstance(linear, AdaptedLinear)
    return linear


def test_parameters_are_those_of_peft() -> None:
    module = lora_module(lora_alpha=6)
    linear = linear_of(module)
    assert linear.A is module.lora_A["default"].weight
    assert linear.B is module.lora_B["default"].weight
    assert linear.weight is module.base_layer.weight
    assert linear.bias is module.base_layer.bias
    assert linear.scaling == 3


def test_changes_are_seen() -> None:
    module = lora_module()
    linear = linear_of(module)
    assert linear.is_ready()
    module.enable_adapters(False)
    assert not linear.is_ready()
    module.enable_adapters(True)
    module.merge()
    assert not linear.is_ready()
    module.unmerge()
    assert linear.is_ready()
    module.set_adapter([])
    assert not linear.is_ready()
    module.set_adapter(["default"])
    module.lora_B["default"].register_forward_hook(lambda *_: None)
    assert not linear.is_ready()


def test_another_base_is_no_obstacle_in_silence() -> None:
    module = lora_module()
    module.base_layer = nn.LazyLinear(6)
    assert adapted_linear(module) == "a base of LazyLinear"
