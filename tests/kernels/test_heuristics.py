"""Which layers get a fused kernel, and which one."""

from dataclasses import replace

from hqqtrain_kernels import Layout, heuristics
from hqqtrain_kernels.heuristics import GemvConfig, KernelConfig, SkinnyGemmConfig, WideGemmConfig

SIZES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
"""out_features and in_features of the products of a decoder layer of an 8B model."""


def selected(layout: Layout, M: int, capability: tuple[int, int] = (9, 0)) -> KernelConfig | None:
    return heuristics.select_kernel(capability, layout, M)


def test_the_rest_is_left_to_cublas() -> None:
    layout = Layout(28672, 8192, 4, 64, 1)
    assert selected(layout, 128) is not None
    assert selected(layout, 0) is selected(layout, 129) is None
    assert selected(layout, 17, (8, 0)) is None
    for N, M in ((8191, 65), (4096, 17), (2048, 2), (1023, 1)):
        assert selected(replace(layout, out_features=N), M) is None
    assert selected(replace(layout, axis=0), 1) is None
    assert isinstance(selected(layout, 1), GemvConfig)
    for small in (Layout(1024, 4096, 4, 64, 1), Layout(4096, 4096, 4, 64, 1)):
        assert isinstance(selected(small, 1), GemvConfig)
        assert selected(small, 1) != selected(layout, 1)
    assert selected(replace(layout, out_features=1024), 1) == selected(layout, 1)
    by_size = [selected(Layout(N, K, 4, 64, 1), 1) for N, K in SIZES]
    assert by_size[0] == by_size[1] != by_size[2] == by_size[3]
    assert selected(replace(layout, out_features=2048, nbits=8), 1) is None
    assert isinstance(selected(Layout(28672, 8192 + 64, 4, 64, 1), 1), SkinnyGemmConfig)
    assert isinstance(selected(Layout(28672, 8192, 3, 64, 1), 1), SkinnyGemmConfig)
    assert isinstance(selected(Layout(28672, 8192, 8, 64, 1), 1), WideGemmConfig)
    for group_size in (8, 16, 512 + 64):
        assert selected(Layout(28672, group_size * 32, 4, group_size, 1), 1) is None
