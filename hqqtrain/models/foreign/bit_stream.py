"""Codes that are packed one after the other into 32-bit words, the first in the lowest bits.

GPTQ and compressed-tensors pack so, also codes of 3 bits, which reach from one word into the next.
"""

import math

import torch
from torch import Tensor

WORD_BITS = 32
WORD_CODES = 32
"""Codes after which a stream of any width is at the beginning of a word again."""


def words_of(codes: int, nbits: int) -> int:
    """Return the words that a number of codes needs."""
    return math.ceil(codes * nbits / WORD_BITS)


def unpack_words(words: Tensor, nbits: int, codes: int) -> Tensor:
    """Return the first codes of each row.

    Args:
        words: int32 [n, w].
        nbits: Bits of a code, at most 8.
        codes: Number of codes in a row.

    Returns:
        uint8 [n, codes].
    """
    # 8 codes are `nbits` bytes.
    octets = math.ceil(codes / 8)
    if words.stride(1) != 1:
        words = words.clone(memory_format=torch.contiguous_format)
    stream = words.view(torch.uint8)[:, : octets * nbits]
    stream = torch.nn.functional.pad(stream, (0, octets * nbits - stream.shape[1]))
    stream = stream.view(len(words), octets, nbits)
    unpacked = torch.empty(len(words), octets, 8, dtype=torch.uint8, device=words.device)
    for index in range(8):
        byte, shift = divmod(index * nbits, 8)
        code = stream[..., byte] >> shift
        if shift + nbits > 8:
            code = code | stream[..., byte + 1] << (8 - shift)
        unpacked[..., index] = code & ((1 << nbits) - 1)
    return unpacked.flatten(1)[:, :codes]
