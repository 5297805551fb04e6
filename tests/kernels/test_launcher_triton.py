"""Launches by name: later launches pass values by position, so the order must be the kernel's."""

from collections.abc import Callable

import pytest
import torch
from kernel_weights import DEVICE

pytest.importorskip("triton", reason="Triton is not installed here")
import triton
from triton import language as tl

from hqqtrain_kernels.launcher_triton import CachedKernel


@triton.jit(do_not_specialize=["n"])
def add_kernel(x_ptr, y_ptr, n, ADDEND: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, i < n) + ADDEND, i < n)


def test_repeated_launches_take_their_own_arguments() -> None:
    kernel = CachedKernel(add_kernel, {"ADDEND": 2, "BLOCK": 16}, num_warps=1)
    x = torch.arange(16, dtype=torch.float32, device=DEVICE)
    for n in (3, 5, 16):
        y = torch.zeros(16, device=DEVICE)
        kernel.launch(grid=(1, 1, 1), tensors={"x_ptr": x, "y_ptr": y}, integers={"n": n})
        assert y.tolist() == [*(i + 2.0 for i in range(n)), *[0.0] * (16 - n)]


def test_another_order_than_the_kernels_is_refused() -> None:
    kernel = CachedKernel(add_kernel, {"ADDEND": 2, "BLOCK": 16})
    x, y = torch.zeros(2, 16, device=DEVICE)
    with pytest.raises(AssertionError, match="y_ptr"):
        kernel.launch(grid=(1, 1, 1), tensors={"y_ptr": y, "x_ptr": x}, integers={"n": 1})


@pytest.mark.parametrize(
    ("options", "expected"), [({}, True), ({"enable_fp_fusion": False}, False)]
)
def test_fp_fusion_does_not_depend_on_the_version_of_triton(options: dict, expected: bool) -> None:
    """Triton 3.10 turns its default around, and with it bits of results."""
    given = []

    class Kernel:
        def __init__(self) -> None:
            self.arg_names = ["x_ptr"]

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda **arguments: given.append(arguments)

    kernel = CachedKernel(Kernel(), {}, **options)
    kernel.launch(grid=(1, 1, 1), tensors={"x_ptr": torch.zeros(1)}, integers={})
    assert given[0]["enable_fp_fusion"] is expected
