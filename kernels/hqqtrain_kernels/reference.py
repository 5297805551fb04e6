"""Packing and dequantizing in plain torch: what the kernels are measured against.

Runs on every device, fast enough on a CPU to train with. A packed row is a sequence of 16-byte
tiles of 8 little-endian halfwords; bit field i (bits b*i ..) of halfword h holds code 8*i + h of
the tile. So one 16-byte load yields, field by field, 8 neighbouring codes: one 16-byte store of
bf16 weights.
"""

import torch
from torch import Tensor

from hqqtrain_kernels.layout import Layout, packed_bytes, planes

CHUNK_CODES = 1 << 24
"""Codes dequantized at a time, which bounds the temporary memory to about 100 MB."""


def pack(codes: Tensor, nbits: int) -> Tensor:
    """Packs uint8 codes [units, n], each below 2**nbits, to uint8 [units, row_bytes]."""
    low, *top = planes(nbits)
    packed = [_pack_plane(codes & ((1 << low) - 1), low)]
    packed += [_pack_plane(codes >> low, width) for width in top]
    return torch.cat(packed, dim=1) if top else packed[0]


def unpack(W_q: Tensor, nbits: int, n: int) -> Tensor:
    """The codes of `pack`, uint8 [units, n]; W_q is uint8, or the same bits viewed as a float."""
    return _unpack(as_bytes(W_q), nbits, n).to(torch.uint8)


def dequantize(
    W_q: Tensor, scale: Tensor, zero: Tensor, layout: Layout, dtype: torch.dtype
) -> Tensor:
    """(W_q - zero) * scale in fp32, rounded once to `dtype`: [out_features, in_features].

    W_q [units, row_bytes] is uint8 or the same bits viewed as a float; scale and zero are
    [units, groups] of any float dtype.
    """
    W_q, units = as_bytes(W_q), layout.units
    classes = layout.out_features // units
    out = torch.empty(classes, units, layout.in_features, dtype=dtype, device=W_q.device)
    step = max(1, CHUNK_CODES // layout.row_codes)
    for part in (slice(start, start + step) for start in range(0, units, step)):
        codes = _unpack(W_q[part], layout.nbits, layout.row_codes).unflatten(1, (layout.groups, -1))
        s, z = scale[part], zero[part]
        if layout.axis == 1:
            s, z = s[..., None], z[..., None]
        else:  # transposed as codes: a 2-D transpose of 16-bit numbers is what torch does fast
            codes = codes.flatten(0, 1).t().contiguous().view(classes, *s.shape)
        W = codes.float().sub_(z).mul_(s)
        out[:, part] = W.view(classes, -1, layout.in_features)
    return out.flatten(0, 1)


def as_bytes(W_q: Tensor) -> Tensor:
    """Packed bits as uint8: a view, never a cast."""
    return W_q if W_q.dtype == torch.uint8 else W_q.view(torch.uint8)


def _pack_plane(codes: Tensor, width: int) -> Tensor:
    fields = 16 // width
    units, n = codes.shape
    tiles = packed_bytes(n, width) // 16
    codes = torch.nn.functional.pad(codes, (0, tiles * fields * 8 - n))
    codes = codes.view(units, tiles, fields, 8)
    halfwords = torch.zeros(units, tiles, 8, dtype=torch.int16, device=codes.device)
    for i in range(fields):
        halfwords |= codes[:, :, i].to(torch.int16) << (width * i)
    return halfwords.flatten(1).view(torch.uint8)


def _unpack(W_q: Tensor, nbits: int, n: int) -> Tensor:
    """int16 codes [units, n]."""
    low, *top = planes(nbits)
    split = packed_bytes(n, low)
    codes = _unpack_plane(W_q[:, :split], low)[:, :n]
    if top:
        codes |= (_unpack_plane(W_q[:, split:], top[0]) << low)[:, :n]
    return codes


def _unpack_plane(W_q: Tensor, width: int) -> Tensor:
    shifts = torch.arange(0, 16, width, dtype=torch.int16, device=W_q.device)
    halfwords = W_q.view(torch.int16).unflatten(1, (-1, 1, 8))
    # The shift of a negative halfword brings in ones; the mask takes them away.
    return (halfwords >> shifts[:, None]).bitwise_and_((1 << width) - 1).flatten(1)
