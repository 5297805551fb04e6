"""The block types of GGUF whose weights are `scale * code + offset`, in our terms.

A row of a tensor is a sequence of blocks. A block has the codes of 32 or 256 weights, and one or
two fp16 numbers; blocks of 256 (the K types) also have small integers that multiply these for each
group of 16 or 32 weights. Five- and six-bit codes are taken over as codes of 8 bits.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Decode = Callable[[Tensor], Tensor]
"""Maps blocks uint8 [..., block_bytes] to codes [..., block_size] or numbers [..., groups]."""


@dataclass(frozen=True)
class BlockType:
    """How a block of weights is stored.

    Attributes:
        nbits: Bits of our codes.
        group_size: Weights that share a scale.
        block_size: Weights of a block.
        block_bytes: Bytes of a block.
        codes: Reads the codes.
        scale: Reads the scales, fp32.
        offset: Reads the offsets, fp32; None: the codes are symmetric.
        center: The code of 0, if the codes are symmetric.
        is_exact: Whether fp16 represents every scale of symmetric codes.
    """

    nbits: int
    group_size: int
    block_size: int
    block_bytes: int
    codes: Decode
    scale: Decode
    offset: Decode | None = None
    center: int = 0
    is_exact: bool = True

    @property
    def meta_dtype(self) -> torch.dtype:
        """The dtype of our scales and zeros; a zero that is a quotient needs fp32."""
        return torch.float32 if self.offset else torch.float16


def _half(start: int) -> Decode:
    """Return a function that reads the fp16 number at byte `start`, as the only group."""

    def read(blocks: Tensor) -> Tensor:
        return _halves(blocks, start)

    return read


def _halves(blocks: Tensor, start: int) -> Tensor:
    """Return the fp16 number at byte `start` of each block, fp32 [..., 1]."""
    number = blocks[..., start : start + 2].clone(memory_format=torch.contiguous_format)
    return number.view(torch.float16).float()


def _nibbles(start: int) -> Decode:
    """Return a function that reads 16 bytes: 16 codes in the low halves, 16 in the high ones."""

    def read(blocks: Tensor) -> Tensor:
        packed = blocks[..., start : start + 16]
        return torch.cat([packed & 15, packed >> 4], -1)

    return read


def _five_bits(start: int) -> Decode:
    """Return a function that reads 4 bytes of fifth bits, and then 16 bytes of nibbles."""

    def read(blocks: Tensor) -> Tensor:
        high = blocks[..., start : start + 4]
        bits = (high[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1
        return _nibbles(start + 4)(blocks) | bits.flatten(-2) << 4

    return read


def _bytes_plus_128(blocks: Tensor) -> Tensor:
    return blocks[..., 2:34] ^ 128  # flips the sign bit: two's complement plus 128


def _fields(packed: Tensor, shifts: tuple[int, ...], mask: int) -> Tensor:
    """Return the bit fields of bytes [..., n], one field of all bytes after the other."""
    return torch.stack([packed >> shift & mask for shift in shifts], -2).flatten(-2)


def _halved(packed: Tensor, shifts: tuple[int, ...], mask: int) -> Tensor:
    """Return the bit fields of bytes [..., 64], those of the first 32 bytes first."""
    return _fields(packed.unflatten(-1, (2, 32)), shifts, mask).flatten(-2)


def _q4_k_codes(blocks: Tensor) -> Tensor:
    return _fields(blocks[..., 16:144].unflatten(-1, (4, 32)), (0, 4), 15).flatten(-2)


def _q5_k_codes(blocks: Tensor) -> Tensor:
    low = _fields(blocks[..., 48:176].unflatten(-1, (4, 32)), (0, 4), 15).flatten(-2)
    return low | _fields(blocks[..., 16:48], tuple(range(8)), 1) << 4


def _q6_k_codes(blocks: Tensor) -> Tensor:
    low = _fields(blocks[..., :128].unflatten(-1, (2, 64)), (0, 4), 15).flatten(-2)
    return low | _halved(blocks[..., 128:192], (0, 2, 4, 6), 3) << 4


def _q2_k_codes(blocks: Tensor) -> Tensor:
    return _halved(blocks[..., 16:80], (0, 2, 4, 6), 3)


def _q3_k_codes(blocks: Tensor) -> Tensor:
    low = _halved(blocks[..., 32:96], (0, 2, 4, 6), 3)
    return low | _fields(blocks[..., :32], tuple(range(8)), 1) << 2


def _six_bit_pairs(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of scales and minima [..., 8] of Q4_K and Q5_K, packed in 12 bytes."""
    first, second, third = blocks[..., 4:16].split(4, -1)
    scales = torch.cat([first & 63, third & 15 | first >> 6 << 4], -1)
    return scales, torch.cat([second & 63, third >> 4 | second >> 6 << 4], -1)


def _q4_k_scale(blocks: Tensor) -> Tensor:
    return _halves(blocks, 0) * _six_bit_pairs(blocks)[0]


def _q4_k_offset(blocks: Tensor) -> Tensor:
    return -_halves(blocks, 2) * _six_bit_pairs(blocks)[1]


def _q2_k_scale(blocks: Tensor) -> Tensor:
    return _halves(blocks, 80) * (blocks[..., :16] & 15)


def _q2_k_offset(blocks: Tensor) -> Tensor:
    return -_halves(blocks, 82) * (blocks[..., :16] >> 4)


def _q3_k_scale(blocks: Tensor) -> Tensor:
    packed = blocks[..., 96:108]
    factors = _fields(packed[..., :8], (0, 4), 15) | _fields(packed[..., 8:], (0, 2, 4, 6), 3) << 4
    return _halves(blocks, 108) * (factors.float() - 32)


def _q6_k_scale(blocks: Tensor) -> Tensor:
    return _halves(blocks, 208) * blocks[..., 192:208].view(torch.int8)


BLOCK_TYPES = {
    "Q4_0": BlockType(4, 32, 32, 18, _nibbles(2), _half(0), center=8),
    "Q4_1": BlockType(4, 32, 32, 20, _nibbles(4), _half(0), _half(2)),
    "Q5_0": BlockType(8, 32, 32, 22, _five_bits(2), _half(0), center=16),
    "Q5_1": BlockType(8, 32, 32, 24, _five_bits(4), _half(0), _half(2)),
    "Q8_0": BlockType(8, 32, 32, 34, _bytes_plus_128, _half(0), center=128),
    "Q2_K": BlockType(2, 16, 256, 84, _q2_k_codes, _q2_k_scale, _q2_k_offset),
    "Q3_K": BlockType(3, 16, 256, 110, _q3_k_codes, _q3_k_scale, center=4, is_exact=False),
    "Q4_K": BlockType(4, 32, 256, 144, _q4_k_codes, _q4_k_scale, _q4_k_offset),
    "Q5_K": BlockType(8, 32, 256, 176, _q5_k_codes, _q4_k_scale, _q4_k_offset),
    "Q6_K": BlockType(8, 16, 256, 210, _q6_k_codes, _q6_k_scale, center=32, is_exact=False),
}
"""The types by their names in GGUF."""
