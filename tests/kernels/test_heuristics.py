"""Which layers get a fused kernel, and which one."""

from dataclasses import replace

from hqqtrain_kernels import Layout, heuristics
from hqqtrain_kernels.heuristics import GemvConfig, KernelConfig, SkinnyGemmConfig, WideGemmConfig


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
    assert isinstance(selected(replace(layout, out_features=1024), 1), GemvConfig)
    assert selected(replace(layout, out_features=1024), 1) != selected(layout, 1)
    assert selected(replace(layout, out_features=2048, nbits=8), 1) is None
    assert isinstance(selected(Layout(28672, 8192 + 64, 4, 64, 1), 1), SkinnyGemmConfig)
    assert isinstance(selected(Layout(28672, 8192, 3, 64, 1), 1), SkinnyGemmConfig)
    assert isinstance(selected(Layout(28672, 8192, 8, 64, 1), 1), WideGemmConfig)
    for group_size in (8, 16, 512 + 64):
        assert selected(Layout(28672, group_size * 32, 4, group_size, 1), 1) is None
