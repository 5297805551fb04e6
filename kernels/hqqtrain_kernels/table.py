"""Which weights a linear layer multiplies packed, and how that kernel is cut.

Looked up, never tried: measuring at run time would cost seconds for every shape, and the ranks of
a run might choose differently and get different bits. Measured on an H200, with groups of 64, for
28672 x 8192 and 8192 x 28672; other GPUs have the same settings, for fewer rows of x.
"""

import functools
from dataclasses import dataclass

from hqqtrain_kernels.layout import Layout


@dataclass(frozen=True)
class Settings:
    """How `linear_triton` cuts its work.

    A program computes `rows` outputs for `batch` rows of x, by `warps` warps. In each step of its
    loop, of which `stages` are under way, every one of its `parts` takes `span` codes of each row.
    `rounded`: weights are rounded and multiplied. Otherwise their codes are, and x is summed over
    groups, before the kernel if `sums`.
    """

    rows: int
    batch: int
    span: int
    parts: int
    warps: int
    stages: int
    rounded: bool = False
    sums: bool = False


@dataclass(frozen=True)
class Choice:
    """Settings for up to `most` rows of x and from `least` outputs on."""

    most: int
    settings: Settings
    least: int = 0


LEAST = 4096
"""Outputs that give every multiprocessor a program of 32. With fewer, most of the GPU would wait
for the rest, while dequantizing is quick: an estimate, not measured."""

MANY = 16384
"""Outputs that give every multiprocessor a program of 128."""

_WIDE = (
    Choice(32, Settings(128, 32, 128, 1, 4, 3, sums=True), MANY),
    Choice(64, Settings(32, 32, 128, 4, 4, 2, rounded=True), 8192),
    Choice(128, Settings(128, 128, 128, 1, 8, 3, rounded=True), MANY),
)
_UP_TO_64 = Choice(64, Settings(128, 64, 256, 1, 8, 2, rounded=True), MANY)
_4_BIT = (
    Choice(1, Settings(32, 1, 128, 4, 4, 3)),
    Choice(4, Settings(32, 4, 128, 4, 4, 3)),
    Choice(8, Settings(32, 8, 128, 4, 4, 3, sums=True)),
    Choice(16, Settings(32, 16, 128, 4, 4, 3, sums=True)),
    _WIDE[0], _UP_TO_64, *_WIDE[1:],
)  # fmt: skip
_2_BIT = (
    Choice(1, Settings(32, 1, 256, 4, 4, 3)),
    Choice(2, Settings(32, 2, 128, 4, 4, 3)),
    *_4_BIT[1:],
)
_3_BIT = (  # spans of 256: two tiles of the 1-bit plane are 32 bytes
    Choice(1, Settings(32, 1, 256, 4, 4, 3)),
    Choice(4, Settings(32, 4, 256, 4, 4, 3)),
    Choice(8, Settings(32, 8, 256, 4, 4, 2, sums=True)),
    Choice(16, Settings(32, 16, 256, 4, 4, 2, sums=True)),
    _UP_TO_64,
    Choice(128, Settings(128, 128, 256, 1, 8, 2, rounded=True), MANY),
)
_1_BIT = (
    *_3_BIT[:3],
    Choice(16, Settings(128, 16, 256, 1, 4, 3, sums=True), MANY),
    *_3_BIT[3:],
)
_8_BIT = (  # bf16 holds no integers of 8 bits above 128
    Choice(1, Settings(32, 1, 128, 4, 4, 3, rounded=True)),
    Choice(16, Settings(64, 16, 256, 1, 4, 2, rounded=True), MANY),
    Choice(16, Settings(32, 16, 128, 4, 4, 3, rounded=True)),
    Choice(64, Settings(128, 64, 128, 1, 8, 2, rounded=True), MANY),
    Choice(128, Settings(128, 128, 128, 1, 8, 2, rounded=True), MANY),
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
        if choice.most >= M and layout.out_features >= choice.least:
            return choice.settings if _fits(layout.group_size, choice.settings) else None
    return None


def _fits(group_size: int, settings: Settings) -> bool:
    """Spans are made of whole groups, or groups of spans; small groups would spill registers."""
    least, span = 32 if settings.batch <= 4 else 64, settings.span
    return group_size >= least and (span % group_size == 0 or group_size % span == 0)
