"""A parameter, a buffer or a plain attribute without values is refused by its name."""

import pytest
import torch
from random_models import random_family
from torch import nn

from hqqtrain.common.errors import UserError
from hqqtrain.loading.filled_check import check_filled
from hqqtrain.models.fqn import base_tensors


@pytest.fixture
def model() -> nn.Module:
    return random_family("llama")


def tensors(model: nn.Module) -> list[torch.Tensor]:
    parameters = [tensor for *_, tensor in base_tensors(model)]
    return [*parameters, *model.parameters(), *model.buffers()]


def test_a_model_with_all_values_passes(model):
    check_filled(model, tensors(model))


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_parameter_without_values_is_named(model, name):
    missing = model.get_parameter(name)
    with pytest.raises(UserError, match=f"LlamaForCausalLM: {name} has no values"):
        check_filled(model, [tensor for tensor in tensors(model) if tensor is not missing])


def test_buffers_and_attributes_count(model):
    filled = tensors(model)
    model.model.layers[0].register_buffer("mask", torch.ones(2), persistent=False)
    with pytest.raises(UserError, match=r"model\.layers\.0\.mask has no values"):
        check_filled(model, filled)
    filled.append(model.model.layers[0].mask)
    model.model.slopes = torch.ones(3)
    with pytest.raises(UserError, match=r"model\.slopes has no values"):
        check_filled(model, filled)
