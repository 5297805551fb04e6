"""Pack codes as a bit stream along the row, the layout that most other programs read.

Code 0 of a row is in the lowest bits of its first byte, and code i begins at bit i * nbits, also
across bytes. MLX, humming and compressed-tensors store this stream in 32-bit integers of little
byte order. Our own layout stores the same codes in another order; see `layout`.
"""

import torch
from torch import Tensor

WORD_BYTES = 4
"""Bytes of the integers that other programs store the stream in."""


def pack_bit_stream(codes: Tensor, nbits: int) -> Tensor:
    """Pack uint8 codes [rows, n], each below 2**nbits, into int32 [rows, ceil(n * nbits / 32)].

    The last integer of a row is padded with zeros.
    """
    rows, n = codes.shape
    # 32 codes are nbits whole integers, and eight codes are nbits whole bytes of one int64.
    codes = torch.nn.functional.pad(codes, (0, -n % 32)).view(rows, -1, 8)
    shifts = torch.arange(0, 8 * nbits, nbits, device=codes.device)
    eights = (codes.to(torch.int64) << shifts).sum(-1, keepdim=True)
    stream = (eights >> torch.arange(0, 8 * nbits, 8, device=codes.device)).to(torch.uint8)
    used = -(-n * nbits // (8 * WORD_BYTES)) * WORD_BYTES
    return stream.flatten(1)[:, :used].contiguous().view(torch.int32)


def unpack_bit_stream(stream: Tensor, nbits: int, n: int) -> Tensor:
    """Return the uint8 codes [rows, n] of a stream [rows, ...] of any integer dtype."""
    bits = stream.contiguous().view(torch.uint8)[:, : -(-n * nbits // 8)]
    shifts = torch.arange(8, dtype=torch.uint8, device=stream.device)
    bits = ((bits[..., None] >> shifts) & 1).flatten(1)[:, : n * nbits].unflatten(1, (n, nbits))
    return (bits << shifts[:nbits]).sum(-1, dtype=torch.uint8)
