"""The dequantizing kernels against the reference, bit for bit: in the interpreter, or on a GPU."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_weights import DEVICE, GPU, packed
from torch import Tensor

from hqqtrain_kernels import Layout, reference

pytest.importorskip("triton", reason="Triton is not installed here")
from hqqtrain_kernels.dequantize_triton import dequantize

NBITS = (8, 4, 3, 2, 1)
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
POISON = 77.0


def check(parts: tuple[Tensor, ...], layout: Layout, out: Tensor) -> None:
    expected = reference.dequantize(*parts, layout, out.dtype)
    dequantize(*parts, layout, out)
    assert_same(out, expected)


def assert_same(got: Tensor, expected: Tensor) -> None:
    # The interpreter truncates to bf16, where a GPU rounds to nearest.
    allowed = 1 if got.dtype == torch.bfloat16 and not GPU else 0
    integer = torch.int32 if got.dtype == torch.float32 else torch.int16
    got, expected = (t.contiguous().view(integer).long() for t in (got, expected))
    assert (got - expected).abs().max() <= allowed


def surrounded(layout: Layout, dtype: torch.dtype, around: int) -> tuple[Tensor, Tensor]:
    """Return a poisoned buffer, and the part of it that the weight will fill."""
    rows, columns = layout.out_features, layout.in_features
    buffer = torch.full((rows + 2, columns + 2 * around), POISON, dtype=dtype, device=DEVICE)
    return buffer, buffer[1:-1, around : around + columns]


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    axis, nbits = draw(st.sampled_from((0, 1))), draw(st.sampled_from(NBITS))
    g = draw(st.sampled_from((8, 16, 32, 64, 128, 256, 24, 40, 1, 4, 7, 12, 100)))
    if axis == 1:
        groups = draw(st.integers(1, max(1, 3000 // g)))
        return Layout(draw(st.integers(1, 4)), g * groups, nbits, g, 1)
    return Layout(g * draw(st.integers(1, 3)), draw(st.integers(1, 150)), nbits, g, 0)


@settings(deadline=None, max_examples=25 if GPU else 70)  # for a GPU, kernels are compiled first
@given(
    layout=layouts(), meta=st.sampled_from(FLOATS), dtype=st.sampled_from(FLOATS),
    view=st.sampled_from((torch.uint8, *FLOATS)), around=st.sampled_from((0, 3, 8, 16)),
)  # fmt: skip
def test_writes_the_bits_of_the_reference_and_nothing_else(
    layout: Layout, meta: torch.dtype, dtype: torch.dtype, view: torch.dtype, around: int
) -> None:
    W_q, scale, zero = packed(layout, meta)
    buffer, out = surrounded(layout, dtype, around)
    check((W_q.view(view), scale, zero), layout, out)
    out.fill_(POISON)
    assert (buffer == POISON).all()


@pytest.mark.parametrize("nbits", NBITS)
@pytest.mark.parametrize(
    ("axis", "rows", "columns", "g"),
    [
        (1, 2, 11008, 64), (1, 1, 13824, 128), (1, 3, 11008, 11008), (1, 3, 1000, 8),
        (1, 3, 1000, 1000), (1, 5, 7, 7), (1, 2, 2048, 16), (0, 128, 1000, 64),
        (0, 320, 7, 320), (0, 64, 344, 32), (0, 7, 1000, 7), (0, 8, 300, 8),
    ],
)  # fmt: skip
def test_sizes_that_fit_no_block(nbits: int, axis: int, rows: int, columns: int, g: int) -> None:
    layout = Layout(rows, columns, nbits, g, axis)
    out = torch.empty(rows, columns, device=DEVICE)
    check(packed(layout), layout, out)


@pytest.mark.parametrize("along", [0, 1])
@pytest.mark.parametrize("axis", [0, 1])
def test_weights_side_by_side_in_one_buffer(axis: int, along: int) -> None:
    q = Layout(16, 48, 4, 8, axis)
    k, v = (replace(q, nbits=nbits) for nbits in (3, 8))
    sizes = [(layout.out_features, layout.in_features)[along] for layout in (q, k, v)]
    shape = (sum(sizes), 48) if along == 0 else (16, sum(sizes))
    buffer = torch.full(shape, POISON, dtype=torch.float16, device=DEVICE)
    weights = []
    for layout, part in zip((q, k, v), buffer.split(sizes, along), strict=True):
        parts = packed(layout)
        dequantize(*parts, layout, part)
        weights.append(reference.dequantize(*parts, layout, torch.float16))
    assert_same(buffer, torch.cat(weights, along))


@pytest.mark.parametrize("axis", [0, 1])
def test_a_slice_of_units_is_those_rows(axis: int) -> None:
    layout = Layout(64, 64, 3, 8, axis)
    parts = packed(layout)
    whole = reference.dequantize(*parts, layout, torch.float32)
    for start, stop in ((0, 1), (3, 8), (5, 8)):
        panel = layout.slice(start, stop)
        out = torch.empty(panel.out_features, 64, device=DEVICE)
        dequantize(*(part[start:stop] for part in parts), panel, out)
        assert_same(out, torch.cat([whole[rows] for rows in layout.rows_of(start, stop)]))


@pytest.mark.parametrize(
    "dtype", FLOATS if GPU else FLOATS[1:]
)  # the interpreter has no denormal bf16
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", NBITS)
def test_every_code_with_scales_and_zeros_of_every_size(
    nbits: int, axis: int, dtype: torch.dtype
) -> None:
    """Results from denormal to infinite, and zeros around every code."""
    layout = Layout(24, 128, nbits, 8, axis)
    W_q, scale, zero = packed(layout, torch.float32)
    scale.view(-1)[:] = torch.logspace(-44, 36, scale.numel()).to(DEVICE)
    zero.view(-1)[::3] = zero.view(-1)[::3].round()
    zero.view(-1)[1::3] *= -1e-30
    check((W_q, scale, zero), layout, torch.empty(24, 128, dtype=dtype, device=DEVICE))


@pytest.mark.parametrize(
    "wrong",
    ["rows", "bytes", "scale", "zero", "out", "transposed", "integers", "double", "gaps"],
)
def test_refuses_arguments_that_do_not_fit(wrong: str) -> None:
    layout = Layout(32, 64, 4, 32, 1)
    W_q, scale, zero = packed(layout)
    out = torch.empty(32, 64, device=DEVICE)
    given = {
        "rows": (W_q[1:], scale, zero, out),
        "bytes": (W_q[:, :16].contiguous(), scale, zero, out),
        "scale": (W_q, scale[:, :1].contiguous(), zero, out),
        "zero": (W_q, scale, zero.t(), out),
        "out": (W_q, scale, zero, out[:, 1:]),
        "transposed": (W_q, scale, zero, torch.empty(64, 32, device=DEVICE).t()),
        "integers": (W_q, scale, zero.int(), out),
        "double": (W_q, scale, zero, out.double()),
        "gaps": (W_q.repeat(1, 2)[:, ::2], scale, zero, out),
    }[wrong]
    with pytest.raises(ValueError, match=r"needs W_q of 32 x 32 bytes, scale and zero \[32, 2\]"):
        dequantize(*given[:3], layout, given[3])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_runs_where_the_weight_is() -> None:
    layout = Layout(64, 128, 4, 64, 1)
    parts = tuple(part.to("cuda:1") for part in packed(layout))
    check(parts, layout, torch.empty(64, 128, dtype=torch.bfloat16, device="cuda:1"))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="the interpreter has no streams")
@pytest.mark.parametrize("axis", [0, 1])
def test_a_captured_graph_writes_again(axis: int) -> None:
    layout = Layout(256, 512, 2, 64, axis)
    parts = packed(layout)
    out = torch.empty(256, 512, dtype=torch.bfloat16, device=DEVICE)
    check(parts, layout, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dequantize(*parts, layout, out)
    parts[0].bitwise_not_()
    graph.replay()
    assert_same(out, reference.dequantize(*parts, layout, torch.bfloat16))


FREE = torch.cuda.mem_get_info()[0] if GPU else 0


@pytest.mark.gpu
@pytest.mark.skipif(FREE < 20 << 30, reason="needs 20 GB of GPU memory")
@pytest.mark.parametrize(("axis", "g"), [(1, 64), (0, 64), (1, 4), (0, 4)])
def test_more_than_2_to_the_31_elements_and_bytes(axis: int, g: int) -> None:
    layout = Layout(math.ceil((1 << 31) / 8192 / g + 1) * g, 8192, 8, g, axis)
    parts = packed(layout)
    out = torch.empty(layout.out_features, 8192, dtype=torch.bfloat16, device=DEVICE)
    dequantize(*parts, layout, out)
    assert out.numel() > 1 << 31
    assert parts[0].numel() > 1 << 31
    for start in (0, layout.units // 2, layout.units - 1):
        some = layout.slice(start, start + 1)
        expected = reference.dequantize(*(p[start : start + 1] for p in parts), some, out.dtype)
        assert_same(torch.cat([out[r] for r in layout.rows_of(start, start + 1)]), expected)
