"""All engines share the methods of the protocol and the check of a gradient."""

import inspect
import math

import pytest
import torch

from hqqtrain.training.engine import ALL_FINITE, Engine, all_finite
from hqqtrain.training.torch_engine import TorchEngine
from hqqtrain.training.zero3_engine import ZeRO3Engine


@pytest.mark.parametrize("kind", [TorchEngine, ZeRO3Engine])
def test_an_engine_has_every_method_with_the_same_parameters(kind: type):
    for name, member in vars(Engine).items():
        if name.startswith("_") or not (inspect.isfunction(member) or isinstance(member, property)):
            continue
        found = inspect.getattr_static(kind, name)
        assert type(found) is type(member), name
        if inspect.isfunction(member):
            assert inspect.signature(found) == inspect.signature(member), name


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_is_enough(value: float):
    grad = torch.ones(3, 4)
    assert all_finite(grad)
    grad[2, 1] = value
    found = all_finite(grad)
    assert found.shape == ()
    assert not found


def test_the_result_without_a_finding_is_the_smallest():
    """Over ranks the largest index wins, so a rank without a finding must lose."""
    assert max([ALL_FINITE, (0, "first")]) == (0, "first")
