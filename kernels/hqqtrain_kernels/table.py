"""Which weights a linear layer multiplies packed, and how that kernel is cut.

Looked up, never tried: measuring at run time would cost seconds for every shape, and the ranks of
a run might choose differently and get different bits. Tried on an H100 with groups of 64, for
28672 x 8192 and 8192 x 8192: the best, or within an eighth of it where one serves several widths.
Those for 8 bits were tried on an H200; spans of 128 for groups below 64, and 8 rows of x at 3 bits
and 1, not at all. Other GPUs have the same settings, for fewer rows of x.
"""

import functools
from dataclasses import dataclass

from hqqtrain_kernels.layout import Layout


@dataclass(frozen=True)
class Vector:
    """One row of x: a program holds `stretch` of its elements; so many to a multiprocessor."""

    stretch: int
    programs: int

    def takes(self, layout: Layout) -> bool:
        """Whole stretches, of 4 tiles or more and at most 8 groups, the columns of a product."""
        g = layout.group_size
        enough = layout.out_features >= 16 and layout.in_features % self.stretch == 0
        enough = enough and self.stretch * layout.nbits >= 512
        return enough and g * 8 >= self.stretch and _are_multiples(self.stretch, g)


@dataclass(frozen=True)
class Skinny:
    """Up to `batch` rows of x: a program of `parts` warps holds `parts` times `span` elements of
    each, and does `rows` outputs in a step, of which `stages` are under way."""

    rows: int
    batch: int
    span: int
    parts: int
    programs: int
    stages: int

    def takes(self, layout: Layout) -> bool:
        """What x sums up to in every group stays in registers, up to these many."""
        g = layout.group_size
        enough = layout.out_features >= self.rows and g >= 32
        return enough and self.span * self.batch <= 64 * g and _are_multiples(self.span, g)


@dataclass(frozen=True)
class Wide:
    """A program computes `rows` outputs for `batch` rows of x, by `warps` warps. In each step of
    its loop, of which `stages` are under way, each of its `parts` takes `span` codes of a row."""

    rows: int
    batch: int
    span: int
    parts: int
    warps: int
    stages: int

    def takes(self, layout: Layout) -> bool:
        """Smaller groups would spill registers."""
        return layout.group_size >= 64 and _are_multiples(self.span, layout.group_size)


def _are_multiples(span: int, group_size: int) -> bool:
    """Spans are made of whole groups, or groups of spans."""
    return span % group_size == 0 or group_size % span == 0


Settings = Vector | Skinny | Wide


@dataclass(frozen=True)
class Choice:
    """Settings for up to `most` rows of x and from `least` outputs on."""

    most: int
    settings: Settings
    least: int = 0


LEAST = 4096
"""Outputs that give every multiprocessor a program of 32. With fewer, most of the GPU would wait
for the rest, while dequantizing is quick: an estimate, not measured."""

SOME = 8192
"""Outputs that give nearly every multiprocessor a program of 64; fewer were not measured."""

MANY = 16384
"""Outputs that give every multiprocessor a program of 128."""

_VECTOR = Choice(1, Vector(512, 12))


def _skinny(rows: int) -> tuple[Choice, ...]:
    return (
        Choice(1, Skinny(32, 1, 256, 4, 3, 3)),
        Choice(8, Skinny(rows, 8, 256, 4, 2, 3)),
        Choice(16, Skinny(rows, 16, 256, 4, 2, 3)),
        Choice(16, Skinny(rows, 16, 128, 4, 2, 3)),
    )


def _wide(largest: Wide) -> tuple[Choice, ...]:
    return (
        Choice(32, Wide(64, 32, 256, 1, 4, 4), SOME),
        Choice(64, Wide(64, 64, 256, 1, 4, 3), SOME),
        Choice(128, largest, MANY),
        Choice(128, Wide(64, 64, 256, 1, 4, 3), SOME),
    )


_4_BIT = (_VECTOR, *_skinny(16), *_wide(Wide(128, 128, 128, 1, 8, 3)))
_3_BIT = (*_skinny(32), *_wide(Wide(64, 128, 128, 1, 4, 3)))
_2_BIT = (_VECTOR, *_skinny(32), *_wide(Wide(128, 128, 128, 1, 8, 3)))
_1_BIT = (_VECTOR, *_3_BIT)
_8_BIT = (  # above 128 the mantissa of bf16 has room for 7 bits
    Choice(1, Wide(32, 1, 128, 4, 4, 3)),
    Choice(16, Wide(64, 16, 256, 1, 4, 2), MANY),
    Choice(16, Wide(32, 16, 128, 4, 4, 3)),
    Choice(64, Wide(128, 64, 128, 1, 8, 2), MANY),
    Choice(128, Wide(128, 128, 128, 1, 8, 2), MANY),
)
_BY_BITS = {8: _8_BIT, 4: _4_BIT, 3: _3_BIT, 2: _2_BIT, 1: _1_BIT}

_MOST = {(9, 0): 128}
"""Rows of x, by compute capability, where measured."""

_MOST_ELSEWHERE = 16


@functools.lru_cache(maxsize=4096)
def choose(capability: tuple[int, int], layout: Layout, M: int) -> Settings | None:
    """The settings for M rows of x, or None: dequantize, and leave the product to cuBLAS."""
    if layout.axis == 0 or layout.out_features < LEAST:
        return None
    if not 1 <= M <= _MOST.get(capability, _MOST_ELSEWHERE):
        return None
    for choice in _BY_BITS[layout.nbits]:
        enough = choice.most >= M and layout.out_features >= choice.least
        if enough and choice.settings.takes(layout):
            return choice.settings
    return None
