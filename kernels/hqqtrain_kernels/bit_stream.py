"""Codes as a bit stream along the row, the layout that most other programs read.

Code 0 of a row is in the lowest bits of its first byte, and code i begins at bit i * nbits, also
across bytes. MLX, humming, GPTQ and compressed-tensors store this stream in 32-bit integers of
little byte order. Our own layout stores the same codes in another order; see `layout`.
"""

import math

import torch
from torch import Tensor

WORD_BITS = 32
WORD_CODES = 32
"""Codes after which a stream of any width is at the beginning of a 32-bit word again."""


def words_of(codes: int, nbits: int) -> int:
    """Return the 32-bit words that a number of codes needs."""
    return math.ceil(codes * nbits / WORD_BITS)


def pack_bit_stream(codes: Tensor, nbits: int) -> Tensor:
    """Pack uint8 codes [rows, n], each below 2**nbits, into int32 [rows, words_of(n, nbits)].

    The last word of a row is padded with zeros.
    """
    rows, n = codes.shape
    # Eight codes are nbits whole bytes.
    codes = torch.nn.functional.pad(codes, (0, -n % WORD_CODES)).unflatten(1, (-1, 8))
    stream = torch.zeros(rows, codes.shape[1], nbits, dtype=torch.uint8, device=codes.device)
    for index in range(8):
        byte, shift = divmod(index * nbits, 8)
        stream[..., byte] |= codes[..., index] << shift
        if shift + nbits > 8:
            stream[..., byte + 1] |= codes[..., index] >> (8 - shift)
    used = words_of(n, nbits) * WORD_BITS // 8
    return stream.flatten(1)[:, :used].contiguous().view(torch.int32)


def unpack_bit_stream(words: Tensor, nbits: int, n: int) -> Tensor:
    """Return the first n codes of each row, uint8 [rows, n], of words [rows, ...] of 32 bits."""
    octets = math.ceil(n / 8)
    if words.stride(1) != 1:
        words = words.clone(memory_format=torch.contiguous_format)
    stream = words.view(torch.uint8)[:, : octets * nbits]
    stream = torch.nn.functional.pad(stream, (0, octets * nbits - stream.shape[1]))
    stream = stream.unflatten(1, (octets, nbits))
    codes = torch.empty(len(words), octets, 8, dtype=torch.uint8, device=words.device)
    for index in range(8):
        byte, shift = divmod(index * nbits, 8)
        code = stream[..., byte] >> shift
        if shift + nbits > 8:
            code = code | stream[..., byte + 1] << (8 - shift)
        codes[..., index] = code & ((1 << nbits) - 1)
    return codes.flatten(1)[:, :n]
