"""The kernel for few rows of x against fp64: in the interpreter, or for real on a GPU.

No further from the truth than a linear layer on the weight dequantized to the dtype of x.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from hqqtrain_kernels import Layout, reference, table
from hqqtrain_kernels.table import Settings

pytest.importorskip("triton", reason="Triton is not installed here")
from hqqtrain_kernels import linear_triton

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
# The interpreter cuts bf16 off where a GPU rounds it, which doubles its errors.
DTYPES = (torch.bfloat16, torch.float16) if GPU else (torch.float16,)
EPSILON = 1e-4  # of the result's norm: a tenth of rounding it to fp16

INTEGERS = Settings(rows=32, batch=4, span=128, parts=2, warps=2, stages=3)
WITH_SUMS = Settings(rows=64, batch=16, span=128, parts=1, warps=4, stages=2, sums=True)
ROUNDED = Settings(rows=64, batch=16, span=128, parts=1, warps=4, stages=3, rounded=True)
WAYS = {"integers": INTEGERS, "with_sums": WITH_SUMS, "rounded": ROUNDED}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def packed(layout: Layout, meta_dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    """Any bytes are codes, also those of the padding."""
    size, meta = (layout.units, layout.row_bytes), (layout.units, layout.groups)
    W_q = torch.randint(0, 256, size, dtype=torch.uint8, device=DEVICE)
    scale = torch.rand(meta, device=DEVICE) * 0.1 + 0.01
    zero = torch.rand(meta, device=DEVICE) * (1 << layout.nbits)
    return W_q, scale.to(meta_dtype), zero.to(meta_dtype)


def assert_as_good(y: Tensor, x: Tensor, parts: tuple[Tensor, ...], layout: Layout,
                   bias: Tensor | None) -> None:  # fmt: skip
    """As a linear layer in the dtype of x; both against fp64."""
    W = reference.dequantize(*parts, layout, torch.float32)
    bias64 = None if bias is None else bias.double()
    truth = F.linear(x.double(), W.double(), bias64)
    eager = F.linear(x, W.to(x.dtype), bias).double() - truth
    error = y.double() - truth
    assert y.dtype == x.dtype
    assert y.shape == truth.shape
    assert error.norm() <= eager.norm() + EPSILON * truth.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
def test_as_good_as_a_linear_layer(nbits: int, way: str, dtype: torch.dtype) -> None:
    if (nbits, dtype) == (8, torch.bfloat16) and way != "rounded":
        pytest.skip("8 bits above 128 are not exact in bf16, and `table` does not ask for it")
    layout = Layout(72, 320, nbits, 64, 1)  # ragged: half a step at the end, 8 rows of 32
    parts = packed(layout)
    x = torch.randn(5, 320, device=DEVICE).to(dtype)
    bias = torch.randn(72, device=DEVICE).to(dtype)
    y = linear_triton.launch(x, *parts, bias, layout, WAYS[way])
    assert_as_good(y, x, parts, layout, bias)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Layout, Settings, torch.dtype, int]:
    settings = WAYS[draw(st.sampled_from(sorted(WAYS)))]
    settings = replace(settings, span=draw(st.sampled_from((128, 256))))
    if settings.parts > 1:
        settings = replace(settings, batch=draw(st.sampled_from((1, 2, 8))))
    g = draw(st.sampled_from((32, 64, 128, settings.span * 2)))
    layout = Layout(
        draw(st.integers(1, 70)), g * draw(st.integers(1, 640 // g)),
        draw(st.sampled_from((4, 3, 2, 1))), g, 1,
    )  # fmt: skip
    return layout, settings, draw(st.sampled_from(DTYPES)), draw(st.integers(1, 20))


@effort(max_examples=200 if GPU else 12, deadline=None, derandomize=True)
@given(cases(), st.sampled_from((torch.bfloat16, torch.float16, torch.float32)), st.integers(0, 9))
def test_any_shape(
    case: tuple[Layout, Settings, torch.dtype, int], meta_dtype: torch.dtype, more: int
) -> None:
    layout, settings, dtype, M = case
    parts = packed(layout, meta_dtype)
    x = torch.randn(M, layout.in_features + more, device=DEVICE).to(dtype)[:, more:]
    assert_as_good(linear_triton.launch(x, *parts, None, layout, settings), x, parts, layout, None)


@pytest.mark.parametrize("way", ["integers", "with_sums"])
def test_whole_numbers_come_out_exactly(way: str) -> None:
    """Products of codes are added, never rounded: fp32 holds all these sums."""
    layout = Layout(40, 384, 4, 128, 1)
    W_q = packed(layout)[0]
    scale = torch.ones(40, 3, device=DEVICE)
    zero = torch.randint(0, 16, (40, 3), device=DEVICE).float()
    x = torch.randint(-3, 4, (5, 384), device=DEVICE).half()
    W = reference.dequantize(W_q, scale, zero, layout, torch.float32)
    y = linear_triton.launch(x, W_q, scale, zero, None, layout, WAYS[way])
    assert torch.equal(y, (x.double() @ W.double().T).half())


@pytest.mark.usefixtures("small_layers_too")
@pytest.mark.parametrize("view", [torch.bfloat16, torch.float32])
def test_codes_may_be_viewed_as_floats(view: torch.dtype) -> None:
    layout = Layout(8, 256, 2, 64, 1)
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


def chosen(layout: Layout, M: int, capability: tuple[int, int] = (9, 0)) -> Settings | None:
    return table.choose(capability, layout, M)


def test_the_table_leaves_the_rest_to_cublas() -> None:
    layout = Layout(28672, 8192, 4, 64, 1)
    assert chosen(layout, 128) is not None
    assert chosen(layout, 0) is chosen(layout, 129) is None
    assert chosen(layout, 17, (8, 0)) is None
    for N, M in ((8192, 65), (4096, 17), (2048, 1)):
        assert chosen(replace(layout, out_features=N), M) is None
    assert chosen(replace(layout, axis=0), 1) is None
    for group_size in (8, 16, 512 + 64):
        assert chosen(Layout(28672, group_size * 32, 4, group_size, 1), 1) is None


@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
def test_what_the_table_chooses_can_be_cut(nbits: int) -> None:
    found = {
        chosen(Layout(N, 8192, nbits, g, 1), M)
        for N in (4096, 28672) for g in (32, 64, 128, 8192) for M in (1, 2, 4, 8, 16, 32, 64, 128)
    }  # fmt: skip
    for settings in found - {None}:
        layout = Layout(40, 1024, nbits, 64, 1)
        x = torch.randn(3, 1024, device=DEVICE).half()
        parts = packed(layout)
        y = linear_triton.launch(x, *parts, None, layout, settings)
        assert_as_good(y, x, parts, layout, None)


@pytest.mark.usefixtures("small_layers_too")
def test_no_kernel_for_fp32_or_no_rows() -> None:
    layout = Layout(8, 128, 4, 64, 1)
    parts = packed(layout)
    assert linear_triton.linear(torch.randn(2, 128, device=DEVICE), *parts, None, layout) is None
    empty = torch.randn(0, 128, device=DEVICE).half()
    assert linear_triton.linear(empty, *parts, None, layout) is None


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
