"""Heuristics: which packed weights a fused linear kernel multiplies, and with which tile sizes.

The configurations are looked up, never autotuned: measuring at run time would cost seconds for
every shape, and the ranks of a run might choose differently and get different bits. They were tuned
on an H100 with groups of 64, for weights of 28672 x 8192 and 8192 x 8192. Each is the best one
found; one that serves several bit widths is at most an eighth slower. Those for 8 bits were
tuned on an H200. Two cases were not measured: BLOCK_K of 128, which serves groups below 64, and 8
rows of x at 3 bits and at 1 bit. Other GPUs use the same configurations, for fewer rows of x. Those
for one row were tuned again on an H200, for the weights of an 8B model: 6144, 4096 and 28672 x 4096
and 4096 x 14336.

Names are Triton's: x is [M, K], the weight [N, K] and the result [M, N], so M counts rows of x
(tokens), N out_features and K in_features.
"""

import functools
from dataclasses import dataclass

from hqqtrain_kernels.layout import Layout


@dataclass(frozen=True)
class GemvConfig:
    """Launch of the kernel for one row of x.

    Attributes:
        block_k: Elements of x that a program keeps in registers: its split of K.
        programs_per_sm: Programs that share a multiprocessor.
    """

    block_k: int
    programs_per_sm: int

    def supports(self, layout: Layout) -> bool:
        """Whether K consists of whole splits of at least 4 tiles and at most 8 groups.

        A tensor core product has at least 8 columns, and the kernel uses one for every group.
        """
        g = layout.group_size
        return (
            layout.out_features >= 16  # the rows of a step
            and layout.in_features % self.block_k == 0
            and self.block_k * layout.nbits >= 512  # 4 tiles of 128 bits
            and g * 8 >= self.block_k
            and _nests(self.block_k, g)
        )


@dataclass(frozen=True)
class SkinnyGemmConfig:
    """Launch of the kernel for up to `block_m` rows of x.

    Attributes:
        block_n: Outputs that a program computes in a step of its loop.
        block_m: Rows of x, padded to this number.
        block_k: Elements of a row of x that one warp multiplies.
        k_slices: Warps of a program, each with its own slice of `block_k` elements. A program's
            split of K is `k_slices * block_k`.
        programs_per_sm: Programs that share a multiprocessor.
        num_stages: Steps in flight in the software pipeline.
    """

    block_n: int
    block_m: int
    block_k: int
    k_slices: int
    programs_per_sm: int
    num_stages: int

    def supports(self, layout: Layout) -> bool:
        """Whether the sums of x over every group fit in the registers."""
        g = layout.group_size
        return (
            layout.out_features >= self.block_n
            and g >= 32
            and self.block_k * self.block_m <= 64 * g
            and _nests(self.block_k, g)
        )


@dataclass(frozen=True)
class WideGemmConfig:
    """Launch of the kernel whose programs compute `block_n` outputs for `block_m` rows of x.

    Attributes:
        block_n: Outputs of a program.
        block_m: Rows of x of a program.
        block_k: Codes of a row of the weight that a slice multiplies in a step of the loop.
        k_slices: Slices of K that the warps of a program share; their sums are added at the end.
        num_warps: Warps of a program.
        num_stages: Steps in flight in the software pipeline.
    """

    block_n: int
    block_m: int
    block_k: int
    k_slices: int
    num_warps: int
    num_stages: int

    def supports(self, layout: Layout) -> bool:
        """Whether groups are large enough: smaller ones would spill registers."""
        return layout.group_size >= 64 and _nests(self.block_k, layout.group_size)


def _nests(block_k: int, group_size: int) -> bool:
    """Whether blocks consist of whole groups, or groups of whole blocks."""
    return block_k % group_size == 0 or group_size % block_k == 0


KernelConfig = GemvConfig | SkinnyGemmConfig | WideGemmConfig


@dataclass(frozen=True)
class Heuristic:
    """A configuration for up to `max_m` rows of x, and for weights of at least this size."""

    max_m: int
    config: KernelConfig
    min_out_features: int = 0
    min_in_features: int = 0

    def applies(self, layout: Layout, M: int) -> bool:
        """Whether the configuration is for M rows of x and a weight of this layout."""
        return (
            self.max_m >= M
            and layout.out_features >= self.min_out_features
            and layout.in_features >= self.min_in_features
            and self.config.supports(layout)
        )


MIN_OUT_FEATURES_32 = 4096
"""Outputs that give every multiprocessor a program with BLOCK_N = 32.

With fewer outputs, most multiprocessors would wait for the others, while dequantizing such a weight
takes little time. This limit is an estimate, not a measurement.
"""

MIN_OUT_FEATURES_ONE_ROW = 1024
"""Outputs for which one row of x is multiplied with the packed weight, at less than 8 bits.

A weight of 1024 x 4096 takes 5.4 us, and 11 us if it is dequantized. Fewer were not measured.
"""

MIN_OUT_FEATURES_64 = 8192
"""Outputs that give nearly every multiprocessor a program with BLOCK_N = 64.

Fewer outputs were not measured.
"""

MIN_OUT_FEATURES_128 = 16384
"""Outputs that give every multiprocessor a program with BLOCK_N = 128."""


def _skinny(
    block_n: int, block_m: int, block_k: int = 256, k_slices: int = 4, programs_per_sm: int = 2
) -> SkinnyGemmConfig:
    return SkinnyGemmConfig(
        block_n=block_n,
        block_m=block_m,
        block_k=block_k,
        k_slices=k_slices,
        programs_per_sm=programs_per_sm,
        num_stages=3,
    )


def _wide(
    block_n: int, block_m: int, block_k: int, num_stages: int, k_slices: int = 1, num_warps: int = 4
) -> WideGemmConfig:
    return WideGemmConfig(
        block_n=block_n,
        block_m=block_m,
        block_k=block_k,
        k_slices=k_slices,
        num_warps=num_warps,
        num_stages=num_stages,
    )


def _up_to_16(block_n: int) -> tuple[Heuristic, ...]:
    """Return the heuristics for up to 16 rows of x."""
    return (
        Heuristic(1, _skinny(block_n=32, block_m=1, programs_per_sm=3)),
        Heuristic(8, _skinny(block_n=block_n, block_m=8)),
        Heuristic(16, _skinny(block_n=block_n, block_m=16)),
        Heuristic(16, _skinny(block_n=block_n, block_m=16, block_k=128)),
    )


def _up_to_128(largest: WideGemmConfig) -> tuple[Heuristic, ...]:
    """Return the heuristics for 17 to 128 rows of x; `largest` serves the largest products."""
    block_64 = _wide(block_n=64, block_m=64, block_k=256, num_stages=3)
    return (
        Heuristic(
            32, _wide(block_n=64, block_m=32, block_k=256, num_stages=4), MIN_OUT_FEATURES_64
        ),
        Heuristic(64, block_64, MIN_OUT_FEATURES_64),
        Heuristic(128, largest, MIN_OUT_FEATURES_128),
        Heuristic(128, block_64, MIN_OUT_FEATURES_64),
    )


_WIDE_128 = _wide(block_n=128, block_m=128, block_k=128, num_warps=8, num_stages=3)
_WIDE_64 = _wide(block_n=64, block_m=128, block_k=128, num_stages=3)

# One row of x, weights of 6144, 4096 and 28672 x 4096 and of 4096 x 14336, H200: 8.9, 7.4, 25.2 and
# 16.4 us at 4 bits, and 7.9, 6.7, 21.1 and 13.1 us at 2 bits.
_4_BIT = (
    Heuristic(1, GemvConfig(block_k=512, programs_per_sm=12), MIN_OUT_FEATURES_128),
    Heuristic(1, GemvConfig(block_k=512, programs_per_sm=12), min_in_features=8192),
    Heuristic(1, GemvConfig(block_k=256, programs_per_sm=16)),
    *_up_to_16(block_n=16),
    *_up_to_128(_WIDE_128),
)
_3_BIT = (*_up_to_16(block_n=32), *_up_to_128(_WIDE_64))
_2_BIT = (
    Heuristic(1, _skinny(block_n=16, block_m=1, programs_per_sm=4)),
    *_up_to_16(block_n=32),
    *_up_to_128(_WIDE_128),
)
_1_BIT = _3_BIT
# 8-bit codes are never multiplied as integers: in a bf16 number from 128 on, the mantissa has room
# for 7 bits.
_8_BIT = (
    Heuristic(1, _wide(block_n=32, block_m=1, block_k=128, k_slices=4, num_stages=3)),
    Heuristic(16, _wide(block_n=64, block_m=16, block_k=256, num_stages=2), MIN_OUT_FEATURES_128),
    Heuristic(16, _wide(block_n=32, block_m=16, block_k=128, k_slices=4, num_stages=3)),
    Heuristic(
        64,
        _wide(block_n=128, block_m=64, block_k=128, num_warps=8, num_stages=2),
        MIN_OUT_FEATURES_128,
    ),
    Heuristic(
        128,
        _wide(block_n=128, block_m=128, block_k=128, num_warps=8, num_stages=2),
        MIN_OUT_FEATURES_128,
    ),
)

HEURISTICS = {8: _8_BIT, 4: _4_BIT, 3: _3_BIT, 2: _2_BIT, 1: _1_BIT}
"""The heuristics by nbits. The first one that applies is used."""

MAX_M = {(9, 0): 128}
"""Upper bound of the rows of x that a fused kernel gets, by compute capability, as measured."""

DEFAULT_MAX_M = 16
"""The same limit for every other compute capability."""


@functools.lru_cache(maxsize=4096)
def select_kernel(capability: tuple[int, int], layout: Layout, M: int) -> KernelConfig | None:
    """Return the configuration of the fused kernel for M rows of x.

    The type of the configuration says which kernel it is for. If the result is None, the caller
    must dequantize the weight and multiply with cuBLAS.
    """
    one_row = M == 1 and layout.nbits < 8
    least = MIN_OUT_FEATURES_ONE_ROW if one_row else MIN_OUT_FEATURES_32
    if layout.axis == 0 or layout.out_features < least:
        return None
    if not 1 <= M <= MAX_M.get(capability, DEFAULT_MAX_M):
        return None
    for heuristic in HEURISTICS[layout.nbits]:
        if heuristic.applies(layout, M):
            return heuristic.config
    return None
