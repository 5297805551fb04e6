"""The packed layout: the one definition, shared by all packages, of where every code is stored.

A weight [out_features, in_features] is cut into `units` of whole groups. Units are dimension 0 of
W_q, scale and zero alike, and every unit is packed independently. A slice of units of the packed
tensors is therefore the packed slice of the weight: sharding, streaming and saving need no other
rule. hqq's own layout pairs distant rows in one byte and cannot be sliced.

Within a unit, the kernels and the reference distinguish these parts:

* A chunk is 8 adjacent codes. Chunk 0 has the codes 0 to 7 of the unit.
* A plane stores some bits of every code. Codes of 3 bits have two planes: the low plane with their
  low two bits, and behind it the high plane with their high bit. Codes of 1, 2, 4 or 8 bits have
  one plane. The width of a plane is its number of bits per code.
* A tile is 16 bytes of a plane. It consists of 8 little-endian halfwords of 16 bits, or 4 words of
  32 bits, and stores 16 / width chunks. A halfword has 16 / width bit fields, the first in its
  lowest bits. Field i of halfword h stores code h of the tile's chunk i.

For example, a tile of 4-bit codes stores 4 chunks. Its halfword 0 is

    code 0  |  code 8 << 4  |  code 16 << 8  |  code 24 << 12.

One 16-byte load therefore yields, field by field, 8 adjacent codes: one 16-byte store of bf16
weights. The last tile of a plane is padded with zeros.
"""

from dataclasses import dataclass, replace
from functools import cached_property

LAYOUT_VERSION = 1

TILE_BYTES = 16
"""Bytes that one load instruction of a thread reads at most."""


@dataclass(frozen=True)
class Layout:
    """How one weight [out_features, in_features] is cut into groups and packed.

    * axis 1: a group is `group_size` adjacent weights of a row. A unit is a row.
    * axis 0: a group runs down a column, as in hqq, through the rows r, r + out/g, r + 2 out/g ...
      of its class r. A unit is one such class of rows, stored as [in_features, group_size]: the
      codes of a column are adjacent.

    Raises:
        ValueError: A size is below one, `group_size` does not divide the axis that the groups run
            along, or `nbits` or `axis` is not supported.
    """

    out_features: int
    in_features: int
    nbits: int
    group_size: int
    axis: int

    def __post_init__(self) -> None:
        if self.nbits not in (8, 4, 3, 2, 1):
            raise ValueError(f"nbits={self.nbits}: allowed are 8, 4, 3, 2, 1")
        if self.axis not in (0, 1):
            raise ValueError(f"axis={self.axis}: allowed are 0 and 1")
        if min(self.out_features, self.in_features, self.group_size) < 1:
            raise ValueError(f"sizes must be at least 1: {self}")
        length = self.in_features if self.axis == 1 else self.out_features
        if length % self.group_size:
            raise ValueError(f"group_size={self.group_size}: does not divide {length}")

    @cached_property
    def units(self) -> int:
        """Dimension 0 of W_q, scale and zero: rows (axis 1) or classes of rows (axis 0)."""
        return self.out_features if self.axis == 1 else self.out_features // self.group_size

    @cached_property
    def unit_codes(self) -> int:
        """Codes in one unit, without padding."""
        return self.in_features * (1 if self.axis == 1 else self.group_size)

    @cached_property
    def groups(self) -> int:
        """Groups in one unit: dimension 1 of scale and zero."""
        return self.unit_codes // self.group_size

    @cached_property
    def unit_bytes(self) -> int:
        """Bytes of one packed unit, a multiple of 16."""
        return packed_bytes(self.unit_codes, self.nbits)

    def rows_of(self, start: int, stop: int) -> list[slice]:
        """Return the weight's rows in units `start` to `stop`, as slices in storage order."""
        if self.axis == 1:
            return [slice(start, stop)]
        firsts = range(0, self.out_features, self.units)
        return [slice(first + start, first + stop) for first in firsts]

    def slice(self, start: int, stop: int) -> "Layout":
        """Return the layout of the weight that consists of units `start` to `stop` alone."""
        rows = (stop - start) * (self.out_features // self.units)
        return replace(self, out_features=rows)


def plane_widths(nbits: int) -> tuple[int, ...]:
    """Return the bit widths of the planes that store a code, low bits first.

    3-bit codes are split: their low two bits form one plane, their high bit another.
    """
    return (2, 1) if nbits == 3 else (nbits,)


def packed_bytes(codes: int, nbits: int) -> int:
    """Return the bytes of `codes` packed codes, every plane padded to whole 16-byte tiles."""
    return sum(-(-codes * width // (8 * TILE_BYTES)) * TILE_BYTES for width in plane_widths(nbits))
