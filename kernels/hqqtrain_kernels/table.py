"""Which weights a linear layer multiplies packed, and how that kernel is cut.

Looked up, never tried: measuring at run time would cost seconds for every shape, and the ranks of
a run might choose differently and get different bits. Measured on an H200, with groups of 64, for
28672 x 8192 and 8192 x 28672; elsewhere the same settings serve fewer rows of x.
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


def _choices(span: int) -> tuple[Choice, ...]:
    return (
        Choice(1, Settings(32, 1, span, 4, 4, 3)),
        Choice(4, Settings(32, 4, span, 4, 4, 3)),
        Choice(8, Settings(32, 8, span, 4, 4, 3, sums=True)),
        Choice(16, Settings(128, 16, 256, 1, 4, 3, sums=True), least=16384),
        Choice(16, Settings(32, 16, span, 4, 4, 2, sums=True)),
        Choice(32, Settings(128, 32, span, 1, 4, 3, rounded=True), least=16384),
        Choice(64, Settings(128, 64, 256, 1, 8, 2, rounded=True), least=16384),
        Choice(128, Settings(128, 128, span, 1, 8, 2, rounded=True), least=16384),
    )


_8_BIT = (
    Choice(1, Settings(32, 1, 128, 4, 4, 3, rounded=True)),
    Choice(16, Settings(128, 16, 128, 1, 4, 3, rounded=True)),
)
_4_OR_2_BIT = _choices(span=128)
_3_OR_1_BIT = _choices(span=256)  # two tiles of the 1-bit plane, 32 bytes
_BY_BITS = {8: _8_BIT, 4: _4_OR_2_BIT, 3: _3_OR_1_BIT, 2: _4_OR_2_BIT, 1: _3_OR_1_BIT}

_MOST = {(9, 0): 128}
"""Rows of x, by compute capability, where measured."""

_MOST_ELSEWHERE = 16


@functools.lru_cache(maxsize=4096)
def choose(capability: tuple[int, int], layout: Layout, M: int) -> Settings | None:
    """The settings for M rows of x, or None: dequantize, and leave the product to cuBLAS."""
    if layout.axis == 0 or not 1 <= M <= _MOST.get(capability, _MOST_ELSEWHERE):
        return None
    for choice in _BY_BITS[layout.nbits]:
        if choice.most >= M and layout.out_features >= choice.least:
            return choice.settings if _fits(layout.group_size, choice.settings) else None
    return None


def _fits(group_size: int, settings: Settings) -> bool:
    """Spans are made of whole groups, or groups of spans; small groups would spill registers."""
    least, span = 32 if settings.parts > 1 else 64, settings.span
    return group_size >= least and (span % group_size == 0 or group_size % span == 0)
