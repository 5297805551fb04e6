"""Encode our layers as blocks of GGUF, and decode blocks to what llama.cpp computes with.

The layouts are those of `ggml-common.h`: scales and minima are fp16, the codes of Q4_1 and Q4_K are
two to a byte, the lower half of a block in the lower bits, and those of Q2_K are four to a byte, 32
weights apart.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hqqtrain.formats.gguf.block_types import BlockType
from hqqtrain.formats.gguf.super_blocks import SuperBlocks, fit_super_blocks
from hqqtrain.formats.layers import PackedLayer
from hqqtrain.models.foreign import gguf_types
from hqqtrain_kernels import Layout

_Q8_MAX = 127


def encode_blocks(layer: PackedLayer, kind: BlockType) -> Tensor:
    """Return the blocks of a layer with its codes, uint8 [out_features, bytes of a row].

    Args:
        layer: The layer, with groups along its rows.
        kind: A type that keeps the codes and fits the layer.
    """
    return _ENCODERS[kind.name](layer).reshape(layer.layout.out_features, -1)


def quantize_q8_0(weight: Tensor) -> Tensor:
    """Round a weight, fp32 [out_features, in_features], to Q8_0, uint8 [out_features, bytes]."""
    blocks = weight.reshape(len(weight), -1, 32)
    scale = (blocks.abs().amax(-1, keepdim=True) / _Q8_MAX).half()
    codes = (blocks / scale.float()).nan_to_num(0.0, _Q8_MAX, -_Q8_MAX).round()
    codes = codes.clamp(-_Q8_MAX, _Q8_MAX).to(torch.int8)
    return torch.cat([_bytes(scale), codes.view(torch.uint8)], -1).reshape(len(weight), -1)


def decode_blocks(blocks: Tensor, kind: BlockType) -> PackedLayer:
    """Return what llama.cpp computes with, as a layer with fp32 scales and zeros.

    Args:
        blocks: The blocks of a weight, uint8 [out_features, bytes of a row].
        kind: Their type.
    """
    rows, row_bytes = blocks.shape
    in_features = row_bytes // kind.block_bytes * kind.block_size
    blocks = blocks.reshape(rows, -1, kind.block_bytes)
    stored = gguf_types.BLOCK_TYPES[kind.name]
    codes, scale = stored.codes(blocks), stored.scale(blocks)
    minimum = -stored.offset(blocks) if stored.offset else stored.center * scale
    scale, minimum = scale.reshape(rows, -1), minimum.reshape(rows, -1)
    # A group whose scale is 0 has one value, which only a zero of a tiny scale can express.
    tiny = torch.finfo(torch.float32).tiny
    scale = torch.where((scale == 0) & (minimum != 0), tiny * 2.0**20, scale)
    zero = torch.where(scale == 0, 0, minimum / scale)
    layout = Layout(rows, in_features, kind.nbits, kind.group_size, 1)
    return PackedLayer.from_codes(codes.reshape(rows, in_features), scale, zero, layout)


def _encode_q4_1(layer: PackedLayer) -> Tensor:
    scale, zero = layer.scale.float(), layer.zero.float()
    repeats = layer.layout.group_size // 32
    d, m = (x.half().repeat_interleave(repeats, 1)[..., None] for x in (scale, -zero * scale))
    low, high = layer.codes.reshape(*d.shape[:2], 2, 16).unbind(2)
    return torch.cat([_bytes(d), _bytes(m), low | high << 4], -1)


def _encode_q4_k(layer: PackedLayer) -> Tensor:
    fitted = fit_super_blocks(layer, sub_block_size=32, levels=63)
    low, high = layer.codes.reshape(*fitted.d.shape, 4, 2, 32).unbind(3)
    codes = (low | high << 4).flatten(2)
    return torch.cat([*_halves(fitted), _pack_6_bits(fitted.scale, fitted.minimum), codes], -1)


def _pack_6_bits(scale: Tensor, minimum: Tensor) -> Tensor:
    """Pack 8 scales and 8 minima of 6 bits into 12 bytes, as `get_scale_min_k4` reads them."""
    s, m = scale.unflatten(-1, (2, 4)), minimum.unflatten(-1, (2, 4))
    first = s[..., 0, :] | s[..., 1, :] >> 4 << 6
    second = m[..., 0, :] | m[..., 1, :] >> 4 << 6
    third = s[..., 1, :] & 15 | (m[..., 1, :] & 15) << 4
    return torch.cat([first, second, third], -1)


def _encode_q2_k(layer: PackedLayer) -> Tensor:
    fitted = fit_super_blocks(layer, sub_block_size=16, levels=15)
    a, b, c, d = layer.codes.reshape(*fitted.d.shape, 2, 4, 32).unbind(3)
    codes = (a | b << 2 | c << 4 | d << 6).flatten(2)
    return torch.cat([fitted.scale | fitted.minimum << 4, codes, *_halves(fitted)], -1)


def _halves(fitted: SuperBlocks) -> tuple[Tensor, Tensor]:
    return _bytes(fitted.d[..., None]), _bytes(fitted.d_min[..., None])


def _bytes(half: Tensor) -> Tensor:
    """Return fp16 [..., 1] as uint8 [..., 2], in the little-endian order of GGUF."""
    return half.contiguous().view(torch.uint8)


_ENCODERS: dict[str, Callable[[PackedLayer], Tensor]] = {
    "Q4_1": _encode_q4_1, "Q4_K": _encode_q4_k, "Q2_K": _encode_q2_k,
}  # fmt: skip
