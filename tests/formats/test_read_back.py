"""An exported layer is a linear of ours with the dtype of its scale."""

import pytest
import torch

from hqqtrain.common.errors import UserError
from hqqtrain.formats.layers import PackedLayer
from hqqtrain.formats.read_back import as_linear, refuse_tiny_scales
from hqqtrain_kernels import Layout


def _layer() -> PackedLayer:
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (8, 64), dtype=torch.uint8)
    return PackedLayer.from_codes(
        codes, torch.rand(8, 2) + 0.1, torch.rand(8, 2) * 15, Layout(8, 64, 4, 32, 1)
    )


def test_a_linear_has_the_weight_of_its_layer():
    layer = _layer()
    x = torch.randn(3, 64)
    torch.testing.assert_close(as_linear(layer)(x), x @ layer.dequantize().t())
    assert as_linear(layer).scale.dtype == torch.float32


def test_a_tiny_scale_is_refused_unless_its_weights_are_zero():
    layer = _layer()
    refuse_tiny_scales("x", layer, "fix")
    layer.weight.scale[0, 0] = 1e-5
    with pytest.raises(UserError, match=r"x: has a scale of 1e-05, .*; fix\."):
        refuse_tiny_scales("x", layer, "fix")
    layer.weight.W_q[0], layer.weight.zero[0] = 0, 0
    refuse_tiny_scales("x", layer, "fix")
