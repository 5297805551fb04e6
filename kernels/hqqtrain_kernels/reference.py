"""Packing and dequantizing in plain PyTorch: the reference that the kernels are tested against.

It runs on every device, and is fast enough on a CPU to train with.

`layout` describes the packed layout: bit field i of halfword h of a 16-byte tile stores code
8 * i + h of the tile.
"""

import torch
from torch import Tensor

from hqqtrain_kernels.layout import Layout, packed_bytes, plane_widths

CHUNK_CODES = 1 << 24
"""Codes dequantized at a time, which bounds the temporary memory to about 100 MB."""


def pack(codes: Tensor, nbits: int) -> Tensor:
    """Pack uint8 codes [units, n], each below 2**nbits, into uint8 [units, unit_bytes]."""
    low, *high = plane_widths(nbits)
    planes = [_pack_plane(codes & ((1 << low) - 1), low)]
    planes += [_pack_plane(codes >> low, width) for width in high]
    return torch.cat(planes, dim=1) if high else planes[0]


def unpack(W_q: Tensor, nbits: int, n: int) -> Tensor:
    """Return the codes that `pack` packed, uint8 [units, n].

    W_q is uint8, or the same bits viewed as a float dtype.
    """
    return _unpack(as_bytes(W_q), nbits, n).to(torch.uint8)


def dequantize(
    W_q: Tensor,
    scale: Tensor,
    zero: Tensor,
    layout: Layout,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Compute (W_q - zero) * scale in fp32, rounded once to `dtype`.

    Args:
        W_q: Packed codes [units, unit_bytes], uint8 or the same bits viewed as a float dtype.
        scale: [units, groups] of any float dtype.
        zero: [units, groups] of any float dtype.
        layout: How the weight is packed.
        dtype: Dtype of the result.
        out: A tensor [out_features, in_features] of `dtype` to write to, or None.

    Returns:
        The weight [out_features, in_features].
    """
    W_q, units = as_bytes(W_q), layout.units
    rows_per_unit = layout.out_features // units
    if out is None:
        shape = layout.out_features, layout.in_features
        out = torch.empty(shape, dtype=dtype, device=W_q.device)
    by_unit = out.unflatten(0, (rows_per_unit, units))
    units_per_chunk = max(1, CHUNK_CODES // layout.unit_codes)
    for start in range(0, units, units_per_chunk):
        chunk = slice(start, start + units_per_chunk)
        codes = _unpack(W_q[chunk], layout.nbits, layout.unit_codes)
        codes = codes.unflatten(1, (layout.groups, -1))
        s, z = scale[chunk], zero[chunk]
        if layout.axis == 1:
            s, z = s[..., None], z[..., None]
        else:
            # Groups are columns: transpose while the codes are still int16, because PyTorch has a
            # fast 2-D transpose of 16-bit numbers.
            codes = codes.flatten(0, 1).t().contiguous().view(rows_per_unit, *s.shape)
        W = codes.float().sub_(z).mul_(s)
        by_unit[:, chunk] = W.view(rows_per_unit, -1, layout.in_features)
    return out


def as_bytes(W_q: Tensor) -> Tensor:
    """View packed bits as uint8, without a cast."""
    return W_q if W_q.dtype == torch.uint8 else W_q.view(torch.uint8)


def min_stored_scale(dtype: torch.dtype) -> float:
    """Return the smallest scale that is stored: a subnormal number of `dtype`, but not of fp32."""
    limits = torch.finfo(dtype)
    return max(limits.smallest_normal * limits.eps, 2.0**-126)


def _pack_plane(codes: Tensor, width: int) -> Tensor:
    """Pack codes [units, n] of `width` bits into uint8 [units, bytes of the plane]."""
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
    """Return the codes of uint8 W_q as int16 [units, n]."""
    low, *high = plane_widths(nbits)
    split = packed_bytes(n, low)
    codes = _unpack_plane(W_q[:, :split], low)[:, :n]
    if high:
        codes |= (_unpack_plane(W_q[:, split:], high[0]) << low)[:, :n]
    return codes


def _unpack_plane(W_q: Tensor, width: int) -> Tensor:
    """Return all codes of one plane, those of the padding too, as int16."""
    shifts = torch.arange(0, 16, width, dtype=torch.int16, device=W_q.device)
    halfwords = W_q.view(torch.int16).unflatten(1, (-1, 1, 8))
    # Shifting a negative halfword fills in ones from the left; the mask removes them.
    return (halfwords >> shifts[:, None]).bitwise_and_((1 << width) - 1).flatten(1)
