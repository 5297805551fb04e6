"""The kernels for 4 bits of PyTorch compute our weights, on a CPU and on a GPU."""

import pytest
import torch
from backend_products import check_model, check_products, make_layer

from hqqtrain.inference.backends.torchao import TorchaoBackend

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("device", DEVICES)
def test_products(device, group_size):
    layer = make_layer(4, group_size, columns=max(576, 3 * group_size) // 256 * 256 or 576,
                       device=device)  # fmt: skip
    check_products(TorchaoBackend(), layer)


@pytest.mark.parametrize("columns", [32, 64, 128, 576])
@pytest.mark.parametrize("device", DEVICES)
def test_any_whole_groups(device, columns):
    check_products(
        TorchaoBackend(), make_layer(4, 32, rows=16, columns=columns, device=device, bias=False)
    )


@pytest.mark.parametrize(
    ("device", "compiler"), [("cpu", "aot_eager"),
                             pytest.param("cuda", "inductor", marks=pytest.mark.gpu)],
)  # fmt: skip
def test_a_model_with_an_adapter(make_wide, device, compiler):
    check_model("torchao", make_wide, 4, device=device, compiler=compiler)


def test_autocast_decides_the_dtype():
    repacked = TorchaoBackend().repack(make_layer(4))
    x = torch.randn(2, 3, 576)
    assert repacked(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert repacked(x).dtype == torch.bfloat16
    assert repacked(x).shape == (2, 3, 384)
    assert repr(repacked) == "TinygemmLinear(576, 384, bias=True)"
