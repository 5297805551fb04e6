"""The kernels for few rows of x compared with fp64: in the interpreter, or on a GPU.

Their error is at most that of a linear layer on the weight dequantized to the dtype of x.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import settings as effort
from hypothesis import strategies as st
from kernel_weights import DEVICE, GPU, packed
from torch import Tensor
from torch.nn import functional as F

from hqqtrain_kernels import Layout, heuristics, reference
from hqqtrain_kernels.heuristics import GemvConfig, KernelConfig, SkinnyGemmConfig, WideGemmConfig

pytest.importorskip("triton", reason="Triton is not installed here")
from hqqtrain_kernels import gemv_triton, linear_triton, skinny_gemm_triton

DTYPES = (torch.bfloat16, torch.float16)
EPSILON = {torch.bfloat16: 1e-4 if GPU else 2.0**-7, torch.float16: 1e-4}
"""Tolerance as a share of the result's norm: a tenth of the error of rounding it to fp16.

The interpreter truncates to bf16 instead of rounding, products too: it is off by a digit.
"""

CONFIGS: dict[str, KernelConfig] = {
    "gemv": GemvConfig(block_k=512, programs_per_sm=4),
    "skinny": SkinnyGemmConfig(
        block_n=32, block_m=8, block_k=128, k_slices=4, programs_per_sm=2, num_stages=3
    ),
    "wide": WideGemmConfig(
        block_n=64, block_m=16, block_k=128, k_slices=1, num_warps=4, num_stages=3
    ),
    "wide, slices": WideGemmConfig(
        block_n=32, block_m=4, block_k=128, k_slices=2, num_warps=2, num_stages=3
    ),
}


def assert_as_good(
    y: Tensor, x: Tensor, parts: tuple[Tensor, ...], layout: Layout, bias: Tensor | None
) -> None:
    """Check that y is as close to fp64 as a linear layer in the dtype of x."""
    W = reference.dequantize(*parts, layout, torch.float32)
    bias64 = None if bias is None else bias.double()
    truth = F.linear(x.double(), W.double(), bias64)
    eager = F.linear(x, W.to(x.dtype), bias).double() - truth
    error = y.double() - truth
    assert y.dtype == x.dtype
    assert y.shape == truth.shape
    assert error.norm() <= eager.norm() + EPSILON[y.dtype] * truth.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
def test_as_good_as_a_linear_layer(nbits: int, name: str, dtype: torch.dtype) -> None:
    M, K = (1, 1024) if name == "gemv" else (5, 320)  # 320: half a step at the end
    layout = Layout(72, K, nbits, 64, 1)  # ragged: 8 rows of 16, 32, 64
    if not can_run(CONFIGS[name], layout):
        pytest.skip("`heuristics` never selects it")
    parts = packed(layout)
    x = torch.randn(M, K, device=DEVICE).to(dtype)
    bias = torch.randn(72, device=DEVICE).to(dtype)
    y = linear_triton.launch(x, *parts, bias, layout, CONFIGS[name])
    assert_as_good(y, x, parts, layout, bias)


def can_run(config: KernelConfig, layout: Layout) -> bool:
    """Whether the kernel supports the layout.

    bf16 has 7 bits for integers above 128, and the two planes of 3 bits have different tiles.
    """
    supported = {
        GemvConfig: (4, 2, 1),
        SkinnyGemmConfig: (4, 3, 2, 1),
        WideGemmConfig: (8, 4, 3, 2, 1),
    }
    return layout.nbits in supported[type(config)] and config.supports(layout)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Layout, KernelConfig, torch.dtype, int]:
    config = CONFIGS[draw(st.sampled_from(sorted(CONFIGS)))]
    M = draw(st.integers(1, 20))
    g = draw(st.sampled_from((32, 64, 128, 512)))
    K = g * draw(st.integers(1, max(1, 640 // g)))
    match config:
        case GemvConfig():
            M, K = 1, 512 * draw(st.integers(1, 2))
        case SkinnyGemmConfig():
            config = replace(config, block_m=16 if M > 8 else 8, block_k=draw(BLOCK_KS))
            M = min(M, 16)
        case WideGemmConfig():
            config = replace(config, block_k=draw(BLOCK_KS))
    layout = Layout(draw(st.integers(32, 90)), K, draw(st.sampled_from((4, 3, 2, 1))), g, 1)
    assume(can_run(config, layout))
    return layout, config, draw(st.sampled_from(DTYPES)), M


BLOCK_KS = st.sampled_from((128, 256))


@effort(max_examples=200 if GPU else 40, deadline=None, derandomize=True)
@given(cases(), st.sampled_from((torch.bfloat16, torch.float16, torch.float32)), st.integers(0, 9))
def test_any_shape(
    case: tuple[Layout, KernelConfig, torch.dtype, int], meta_dtype: torch.dtype, more: int
) -> None:
    layout, config, dtype, M = case
    parts = packed(layout, meta_dtype)
    x = torch.randn(M, layout.in_features + more, device=DEVICE).to(dtype)[:, more:]
    assert_as_good(linear_triton.launch(x, *parts, None, layout, config), x, parts, layout, None)


@pytest.mark.parametrize("name", ["gemv", "skinny"])
def test_whole_numbers_come_out_exactly(name: str) -> None:
    """Products of codes are added without rounding: fp32 represents all these sums."""
    layout = Layout(40, 512, 4, 128, 1)
    W_q = packed(layout)[0]
    scale = torch.ones(40, 4, device=DEVICE)
    zero = torch.randint(0, 16, (40, 4), device=DEVICE).float()
    x = torch.randint(-3, 4, (1 if name == "gemv" else 5, 512), device=DEVICE).half()
    W = reference.dequantize(W_q, scale, zero, layout, torch.float32)
    y = linear_triton.launch(x, W_q, scale, zero, None, layout, CONFIGS[name])
    assert torch.equal(y, (x.double() @ W.double().T).half())


@pytest.mark.parametrize("adjacent", [1, 2])
@pytest.mark.parametrize("name", ["gemv", "skinny"])
def test_right_in_any_order_of_codes(
    name: str, adjacent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton 3.6 and 3.9 are fast with different orders."""
    module = {"gemv": gemv_triton, "skinny": skinny_gemm_triton}[name]
    monkeypatch.setattr(module, "ADJACENT_PAIRS", adjacent)
    monkeypatch.setattr(module, "_kernel_for", module._kernel_for.__wrapped__)  # without its cache
    for nbits in (4, 2, 1):
        layout = Layout(40, 512, nbits, 64, 1)
        parts = packed(layout)
        x = torch.randn(1, 512, device=DEVICE).bfloat16()
        y = linear_triton.launch(x, *parts, None, layout, CONFIGS[name])
        assert_as_good(y, x, parts, layout, None)


@pytest.mark.parametrize("name", ["gemv", "skinny"])
def test_the_same_bits_from_any_number_of_programs(name: str) -> None:
    layout = Layout(96, 1024, 2, 64, 1)
    parts = packed(layout)
    x = torch.randn(1, 1024, device=DEVICE).half()
    first, *others = (
        linear_triton.launch(
            x, *parts, None, layout, replace(CONFIGS[name], programs_per_sm=programs)
        )
        for programs in (1, 2, 9)
    )
    for other in others:
        assert torch.equal(first, other)


@pytest.mark.usefixtures("small_layers_too")
@pytest.mark.parametrize("view", [torch.bfloat16, torch.float32])
def test_codes_may_be_viewed_as_floats(view: torch.dtype) -> None:
    layout = Layout(32, 256, 2, 64, 1)
    W_q, *meta = packed(layout)
    x = torch.randn(1, 256, device=DEVICE).half()
    expected = linear_triton.linear(x, W_q, *meta, None, layout)
    assert expected is not None
    assert torch.equal(linear_triton.linear(x, W_q.view(view), *meta, None, layout), expected)


def shapes_of_x(k: int) -> dict[str, Tensor]:
    return {
        "vector": torch.randn(k),
        "3d": torch.randn(2, 3, k),
        "columns apart": torch.randn(k, 3).T,
        "every other": torch.randn(3, 2 * k)[:, ::2],
        "expanded": torch.randn(1, 2, k).expand(3, 2, k),
        "transposed": torch.randn(3, 2, k).transpose(0, 1),
        "unaligned": torch.randn(3, k + 1)[:, 1:],
    }


@pytest.mark.usefixtures("small_layers_too")
@pytest.mark.parametrize("shape", shapes_of_x(1))
def test_x_of_any_shape_and_stride(shape: str) -> None:
    layout = Layout(40, 128, 4, 64, 1)
    parts = packed(layout)
    x = shapes_of_x(128)[shape].to(DEVICE, torch.float16)
    y = linear_triton.linear(x, *parts, None, layout)
    assert y is not None
    assert_as_good(y, x, parts, layout, None)


@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
def test_every_selected_configuration_runs(nbits: int) -> None:
    found = {
        heuristics.select_kernel((9, 0), Layout(N, 8192, nbits, g, 1), M)
        for N in (4096, 28672) for g in (32, 64, 128, 8192) for M in (1, 2, 4, 8, 16, 32, 64, 128)
    }  # fmt: skip
    for config in found - {None}:
        layout = Layout(40, 1024, nbits, 64, 1)
        x = torch.randn(min(3, getattr(config, "block_m", 1)), 1024, device=DEVICE).half()
        parts = packed(layout)
        y = linear_triton.launch(x, *parts, None, layout, config)
        assert_as_good(y, x, parts, layout, None)


@pytest.mark.usefixtures("small_layers_too")
def test_no_kernel_for_fp32_or_no_rows() -> None:
    layout = Layout(32, 128, 4, 64, 1)
    parts = packed(layout)
    assert linear_triton.linear(torch.randn(2, 128, device=DEVICE), *parts, None, layout) is None
    empty = torch.randn(0, 128, device=DEVICE).half()
    assert linear_triton.linear(empty, *parts, None, layout) is None


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU: the interpreter takes minutes")
@pytest.mark.parametrize("N", [28672, 8192])
@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
def test_as_good_at_full_size(nbits: int, N: int) -> None:
    layout = Layout(N, 28672 + 8192 - N, nbits, 64, 1)
    parts = packed(layout)
    for M in (1, 3, 16, 60, 128):
        x = torch.randn(M, layout.in_features, device=DEVICE).bfloat16()
        y = linear_triton.linear(x, *parts, None, layout)
        if y is not None:
            assert_as_good(y, x, parts, layout, None)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU's memory")
def test_beyond_two_to_the_31st_weight() -> None:
    layout = Layout((1 << 31) // 32768 + 64, 32768, 2, 64, 1)
    parts = packed(layout)
    x = torch.randn(2, 32768, device=DEVICE).bfloat16()
    y = linear_triton.linear(x, *parts, None, layout)
    assert y is not None
    last = slice(layout.units - 64, layout.units)
    end = tuple(t[last] for t in parts)
    assert_as_good(y[:, last], x, end, layout.slice(last.start, last.stop), None)
