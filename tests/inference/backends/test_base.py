"""A backend is refused where it cannot compute, before any weight is read."""

import pytest
import torch
from backend_products import make_layer

from hqqtrain.common.errors import UserError
from hqqtrain.inference.backends.base import codes_of
from hqqtrain.inference.backends.registry import BACKENDS

CPU, GPU = torch.device("cpu"), torch.device("cuda")
BF16 = torch.bfloat16


def test_the_device():
    BACKENDS["torchao"].check_usable(CPU, BF16)
    with pytest.raises(UserError, match="backend=gemlite: computes on cuda, and the device is cpu"):
        BACKENDS["gemlite"].check_usable(CPU, BF16)


def test_the_dtype():
    message = r"computes in bfloat16, and the model is in float32 \(train.precision\)"
    with pytest.raises(UserError, match=message):
        BACKENDS["torchao"].check_usable(CPU, torch.float32)


@pytest.mark.parametrize("name", ["gemlite", "humming"])
def test_the_package(name, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=rf"{name}, which is .*pip install 'hqqtrain\[{name}\]'"):
        BACKENDS[name].check_usable(GPU, BF16)


def test_the_compute_capability(monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "T4")
    with pytest.raises(UserError, match=r"torchao: needs .* capability 8\.0, and T4 has 7\.5"):
        BACKENDS["torchao"].check_usable(GPU, BF16)


@pytest.mark.parametrize(
    ("name", "dtype", "nbits"),
    [
        ("gemlite", torch.bfloat16, [8, 4, 2, 1]), ("humming", torch.bfloat16, [4, 3, 2, 1]),
        ("humming", torch.float16, [8, 4, 3, 2, 1]), ("torchao", torch.bfloat16, [4]),
        ("torchao", torch.float16, []),
    ],
)  # fmt: skip
def test_the_bits(name, dtype, nbits):
    backend = BACKENDS[name]
    layers = [make_layer(n, columns=1024, dtype=dtype) for n in (8, 4, 3, 2, 1)]
    assert [layer.spec.nbits for layer in layers if backend.refusal(layer) is None] == nbits


def test_scales_that_float16_cannot_hold():
    layer = make_layer(4, columns=1024, dtype=torch.float16)
    layer.scale.data[5, 3] = 1e-6
    assert BACKENDS["humming"].refusal(layer) == "scales outside of the range of float16"
    assert BACKENDS["gemlite"].refusal(layer) is None


@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
def test_codes(nbits):
    layer = make_layer(nbits)
    groups = codes_of(layer).view(384, 9, 64).float()
    scale, zero = layer.scale[..., None].float(), layer.zero[..., None].float()
    assert torch.equal(((groups - zero) * scale).view(384, 576), layer.dequantize(torch.float32))
    layer.view_packed_as(torch.bfloat16)
    assert torch.equal(codes_of(layer).view(groups.shape).float(), groups)
