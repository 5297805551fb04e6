"""Layers whose weights are in host memory compute the same bits and keep them there."""

import copy

import pytest
import torch
from torch import nn

from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain.nn.offload import offload_meta, offload_modules
from hqqtrain.nn.staging import StagedTensors
from hqqtrain.quant.spec import QuantSpec

SPEC = QuantSpec(2, 16, 1, "rtn", torch.bfloat16)


@pytest.fixture(autouse=True)
def _copy_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(StagedTensors, "copies_on_cpu", True)


def layers(count: int = 4) -> list[HQQLinear]:
    return [HQQLinear.from_linear(nn.Linear(32, 32), SPEC) for _ in range(count)]


def test_meta_is_fetched_in_the_forward_and_the_backward_pass() -> None:
    linears = layers()
    model, x = nn.Sequential(*linears), torch.randn(3, 32, requires_grad=True)
    expected = model(x)
    (expected_grad,) = torch.autograd.grad(expected.sum(), x)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    offload_meta([linear] for linear in linears)
    for _ in range(3):
        y = model(x)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(y, expected)
        assert torch.equal(grad, expected_grad)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)
    again = model.state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)
    assert torch.equal(copy.deepcopy(model)(x), expected)


def test_meta_stays_on_the_host_when_a_layer_moves() -> None:
    (linear,) = layers(1)
    offload_meta([[linear]])
    linear.to("meta")
    assert linear.W_q.is_meta
    assert {linear.scale.device.type, linear.zero.device.type} == {"cpu"}
    linear.to(torch.bfloat16)
    assert (linear.compute_dtype, linear.scale.dtype) == (torch.bfloat16, torch.bfloat16)


def test_modules_have_their_weights_while_they_run() -> None:
    modules = [nn.Sequential(linear, nn.LayerNorm(32)) for linear in layers()]
    model, x = nn.Sequential(*modules, nn.ReLU()), torch.randn(3, 32)
    with torch.no_grad():
        expected = model(x)
    offload_modules(model, torch.device("cpu"))
    hosts = {name: param.data_ptr() for name, param in model.named_parameters()}
    seen = []
    modules[1][1].register_forward_pre_hook(lambda norm, _: seen.append(norm.weight.data_ptr()))
    for _ in range(2):
        with torch.inference_mode():
            assert torch.equal(model(x), expected)
    assert seen[0] != hosts["1.1.weight"], "a copy is used"
    assert {name: param.data_ptr() for name, param in model.named_parameters()} == hosts
    with pytest.raises(RuntimeError, match="no gradients"):
        model(x)
    with torch.no_grad(), pytest.raises(RuntimeError, match="shape"):
        model(x[:, 1:])
    assert {name: param.data_ptr() for name, param in model.named_parameters()} == hosts
