"""Scales and minima of super-blocks are fitted with the codes fixed."""

import pytest
import torch

from hqqtrain.formats.gguf.super_blocks import fit_super_blocks
from hqqtrain.formats.layers import PackedLayer
from hqqtrain_kernels import Layout


def _layer(scale: torch.Tensor, zero: torch.Tensor, group_size: int) -> PackedLayer:
    torch.manual_seed(0)
    rows, columns = len(scale), scale.shape[1] * group_size
    codes = torch.randint(0, 4, (rows, columns), dtype=torch.uint8)
    return PackedLayer.from_codes(codes, scale, zero, Layout(rows, columns, 2, group_size, 1))


@pytest.mark.parametrize("levels", [15, 63])
def test_multiples_are_found(levels):
    """Scales and minima that are multiples of one number each are kept."""
    multiples = torch.tensor([[1.0, levels, 7.0, 3.0]])
    scale, minimum = multiples / 64, multiples.flip(1) / 32
    fitted = fit_super_blocks(_layer(scale, minimum / scale, 64), 64, levels)
    assert torch.equal(fitted.d.float()[..., None] * fitted.scale, scale[None])
    assert torch.equal(fitted.d_min.float()[..., None] * fitted.minimum, minimum[None])


def test_the_mean_of_a_sub_block_stays():
    """An error of the scale is made up for by the minimum, but for its own rounding."""
    torch.manual_seed(0)
    layer = _layer(torch.rand(4, 8) + 0.5, torch.rand(4, 8) * 3, 64)
    fitted = fit_super_blocks(layer, 16, 15)
    codes = layer.codes.unflatten(1, (2, 16, 16)).float()
    scale, minimum = (
        (x.float()[..., None] * y)[..., None]
        for x, y in ((fitted.d, fitted.scale), (fitted.d_min, fitted.minimum))
    )
    error = (codes * scale - minimum).mean(-1) - layer.dequantize().view_as(codes).mean(-1)
    # Nearest multiples: half of d_min, which is at least a fifteenth of the largest minimum.
    assert (error.abs() <= fitted.d_min.float().abs()[..., None] * 0.51).all()


def test_rows_are_fitted_alone(monkeypatch):
    torch.manual_seed(0)
    layer = _layer(torch.rand(5, 4), torch.rand(5, 4), 64)
    whole = fit_super_blocks(layer, 16, 15)
    monkeypatch.setattr("hqqtrain.formats.gguf.super_blocks._CHUNK", 512)
    parts = fit_super_blocks(layer, 16, 15)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
