"""The package gguf computes our weights from the blocks that we write, and so do we."""

import pytest
import torch
from gguf import GGMLQuantizationType, quants

from hqqtrain.formats.gguf.block_types import BLOCK_TYPES
from hqqtrain.formats.gguf.blocks import decode_blocks, encode_blocks, quantize_q8_0
from hqqtrain.formats.layers import PackedLayer
from hqqtrain_kernels import Layout

ROWS, COLUMNS = 6, 512


def _layer(nbits: int, group_size: int) -> PackedLayer:
    """Return a layer with scales and zeros as a solver finds them for normal weights."""
    torch.manual_seed(0)
    weights = torch.randn(ROWS, COLUMNS // group_size, group_size) / 20
    low, high = weights.amin(-1), weights.amax(-1)
    scale = ((high - low) / (2**nbits - 1)).bfloat16()
    zero = (-low / scale.float()).bfloat16()
    codes = (weights / scale.float()[..., None] + zero.float()[..., None]).round()
    codes = codes.clamp(0, 2**nbits - 1).to(torch.uint8).view(ROWS, COLUMNS)
    layout = Layout(ROWS, COLUMNS, nbits, group_size, 1)
    return PackedLayer.from_codes(codes, scale, zero, layout)


def _dequantized(blocks: torch.Tensor, kind: str) -> torch.Tensor:
    return torch.from_numpy(quants.dequantize(blocks.numpy(), GGMLQuantizationType[kind]))


def _error(layer: PackedLayer, weight: torch.Tensor) -> float:
    """Return the largest error in steps."""
    return ((weight - layer.dequantize()).abs() / layer.steps()).max().item()


@pytest.mark.parametrize(
    ("kind", "nbits", "group_size", "error"),
    [
        ("Q4_1", 4, 32, 0.01), ("Q4_1", 3, 64, 0.005), ("Q4_1", 1, 128, 0.001),
        ("Q4_K", 4, 32, 0.3), ("Q4_K", 4, 64, 0.15), ("Q4_K", 3, 128, 0.05),
        ("Q4_K", 4, 256, 0.003), ("Q4_K", 4, 512, 0.003),
        ("Q2_K", 2, 16, 0.5), ("Q2_K", 2, 64, 0.15), ("Q2_K", 2, 256, 0.002), ("Q2_K", 1, 64, 0.1),
    ],
)  # fmt: skip
def test_gguf_computes_our_weights(kind, nbits, group_size, error):
    layer, block_type = _layer(nbits, group_size), BLOCK_TYPES[kind]
    blocks = encode_blocks(layer, block_type)
    assert blocks.shape == (ROWS, block_type.row_bytes(COLUMNS))
    weight = _dequantized(blocks, kind)
    assert _error(layer, weight) < error
    decoded = decode_blocks(blocks, block_type)
    torch.testing.assert_close(decoded.dequantize(), weight, rtol=1e-6, atol=1e-7)
    assert torch.equal(decoded.codes, layer.codes)


def test_every_byte_of_q4_1():
    """One block: scale 0.5, minimum -1.5 and the codes 0 to 15 twice."""
    codes = torch.arange(16, dtype=torch.uint8).repeat_interleave(2)[None]
    layer = PackedLayer.from_codes(
        codes, torch.tensor([[0.5]]), torch.tensor([[3.0]]), Layout(1, 32, 4, 32, 1)
    )
    blocks = encode_blocks(layer, BLOCK_TYPES["Q4_1"])[0]
    assert blocks[:4].view(torch.float16).tolist() == [0.5, -1.5]
    assert blocks[4:].tolist() == [low | (low + 8) << 4 for low in range(8) for _ in range(2)]


def test_q8_0_rounds_to_the_nearest_code():
    torch.manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS)
    weight[0] = 0
    blocks = quantize_q8_0(weight)
    largest = weight.view(ROWS, -1, 32).abs().amax(-1).repeat_interleave(32, 1)
    error = (_dequantized(blocks, "Q8_0") - weight).abs()
    assert (error <= largest / 127 * 0.501).all()
    assert torch.equal(decode_blocks(blocks, BLOCK_TYPES["Q8_0"]).dequantize(),
                       _dequantized(blocks, "Q8_0"))  # fmt: skip


@pytest.mark.parametrize("kind", ["Q4_1", "Q4_K", "Q2_K"])
def test_groups_of_one_value_and_negative_zeros(kind):
    """A zero below the codes makes a minimum negative; a scale of 0 makes a group of zeros."""
    layer = _layer(2, 64)
    layer.weight.zero[0] = -1.5
    layer.weight.scale[1] = 0
    weight = _dequantized(encode_blocks(layer, BLOCK_TYPES[kind]), kind)
    ours = layer.dequantize()
    assert (weight - ours).abs().max() < 0.15 * layer.scale.float().max()
    assert (weight[1] == 0).all()
    decoded = decode_blocks(encode_blocks(layer, BLOCK_TYPES[kind]), BLOCK_TYPES[kind])
    torch.testing.assert_close(decoded.dequantize(), weight)
