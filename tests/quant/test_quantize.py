"""Weights that break quantizers, and independence of how a weight is sliced."""

import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forkserver import fork_context
from torch import Tensor

from hqqtrain.common.errors import UserError
from hqqtrain.quant.error import relative_error, squared_error
from hqqtrain.quant.quantize import (
    CHUNK_WEIGHTS,
    QuantizedWeight,
    dequantize_weight,
    quantize_weight,
)
from hqqtrain.quant.solvers.registry import SOLVERS
from hqqtrain.quant.spec import QuantSpec

ALL_BITS = (8, 4, 3, 2, 1)
META = (torch.float32, torch.bfloat16, torch.float16)


def back(W: Tensor, spec: QuantSpec, dtype: torch.dtype = torch.float32) -> Tensor:
    quantized = quantize_weight(W, spec)
    assert quantized.scale.isfinite().all()
    assert quantized.zero.isfinite().all()
    return dequantize_weight(quantized, spec.layout(*W.shape), dtype)


def bits(q: QuantizedWeight) -> Iterator[Tensor]:
    return (t.contiguous().view(torch.uint8) for t in (q.W_q, q.scale, q.zero))


def same_bits(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    return all(torch.equal(x, y) for x, y in zip(bits(a), bits(b), strict=True))


# Without calibration, gptq is least_squares.
@pytest.fixture(params=[name for name in SOLVERS if name != "gptq"])
def solver(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("meta_dtype", META)
@pytest.mark.parametrize("nbits", ALL_BITS)
def test_constant_groups_come_back_exactly(
    solver: str, nbits: int, meta_dtype: torch.dtype, axis: int
) -> None:
    W = torch.randn(64, 64) * 0.02
    values = torch.tensor([0.0, 0.5, -0.0390625, 2.0**-12, -1.0, -0.0, 384.0, 2.0**-14])
    if axis == 1:
        W[:8] = values[:, None]
        assert torch.equal(back(W, QuantSpec(nbits, 16, 1, solver, meta_dtype))[:8], W[:8])
    else:
        W[:, :8] = values
        assert torch.equal(back(W, QuantSpec(nbits, 16, 0, solver, meta_dtype))[:, :8], W[:, :8])


@pytest.mark.parametrize("nbits", ALL_BITS)
def test_constants_of_any_size(solver: str, nbits: int) -> None:
    values = torch.tensor([1e-30, -1e-38, 1e-44, 3e38, -1e30, 0.0], dtype=torch.float32)
    W = values[:, None].expand(6, 32)
    got = back(W, QuantSpec(nbits, 32, 1, solver, torch.float32))
    assert torch.equal(got, W)


@pytest.mark.parametrize("exponent", [-100, -60, -20, 30, 100])
@pytest.mark.parametrize("name", ["least_squares", "rtn"])
@pytest.mark.parametrize("nbits", ALL_BITS)
def test_the_size_of_weights_does_not_matter(nbits: int, name: str, exponent: int) -> None:
    W, spec = torch.randn(16, 64), QuantSpec(nbits, 32, 1, name, torch.float32)
    one, other = quantize_weight(W, spec), quantize_weight(W * 2.0**exponent, spec)
    assert torch.equal(one.W_q, other.W_q)
    assert torch.equal(one.zero, other.zero)
    assert torch.equal(one.scale * 2.0**exponent, other.scale)


@pytest.mark.parametrize("meta_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nbits", ALL_BITS)
def test_tiny_and_huge_weights_keep_their_relative_error(
    solver: str, nbits: int, meta_dtype: torch.dtype
) -> None:
    sizes = torch.tensor([1e-6, 1e-12, 1e-20, 1e-30, 1e4, 1e30, 1e38])
    W, spec = torch.rand(32, 64) * 2 - 1, QuantSpec(nbits, 32, 1, solver, meta_dtype)
    expected = relative_error(W, back(W, spec))
    # Each group of a row is quantized alone, so one weight has the rows of all sizes.
    results = back(torch.cat([W * size for size in sizes]), spec).split(32)
    for size, got in zip(sizes, results, strict=True):
        # hqq shrinks large residuals, so its zero stays at the initial value.
        factor = 2 if solver == "hqq" and size > 1 else 1.2
        assert relative_error(W, got / size) < factor * expected + 1e-6


@pytest.mark.parametrize("meta_dtype", META)
@pytest.mark.parametrize("offset", [1.0, -300.0])
def test_tiny_range_far_from_zero(solver: str, meta_dtype: torch.dtype, offset: float) -> None:
    W = offset + torch.randn(32, 64) * 1e-6 * abs(offset)
    for nbits in ALL_BITS:
        error = relative_error(W, back(W, QuantSpec(nbits, 16, 1, solver, meta_dtype)))
        assert error < (1e-11 if meta_dtype == torch.float32 else 1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("meta_dtype", META)
@pytest.mark.parametrize("nbits", ALL_BITS)
def test_never_nan_from_finite_weights(
    solver: str, nbits: int, meta_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    limits = torch.finfo(dtype)
    hostile = [
        torch.randn(16, 32) * 1e4,
        torch.rand(16, 32) * (limits.max / 4),
        torch.randn(16, 32) * limits.smallest_normal,
        torch.tensor([limits.max / 2, -limits.max / 2]).repeat(16, 16),
        torch.tensor([limits.tiny, 0.0]).repeat(16, 16),
        torch.where(torch.rand(16, 32) < 0.03, 5e4, 1e-6),
        torch.cat([torch.zeros(16, 31), torch.ones(16, 1)], dim=1),
    ]
    W = torch.cat(hostile).to(dtype)  # groups of 16 along either axis are within one of them
    for axis in (0, 1):
        assert not back(W, QuantSpec(nbits, 16, axis, solver, meta_dtype)).isnan().any()


def test_an_all_zero_weight_is_zero(solver: str) -> None:
    for axis in (0, 1):
        spec = QuantSpec(2, None, axis, solver, torch.bfloat16)
        assert not back(torch.zeros(8, 24), spec).any()


@pytest.mark.parametrize("group_size", [1, 2, 3, None])
def test_small_and_odd_groups(solver: str, group_size: int | None) -> None:
    W = torch.randn(9, 21)
    for axis in (0, 1):
        if group_size == 2:
            continue
        for nbits in ALL_BITS:
            got = back(W, QuantSpec(nbits, group_size, axis, solver, torch.float32))
            if group_size == 1:
                assert torch.equal(got, W)
            else:
                assert relative_error(W, got) < {8: 1e-3, 4: 0.05, 3: 0.1, 2: 1, 1: 5}[nbits]
    two = back(torch.randn(4, 8), QuantSpec(1, 2, 1, solver, torch.float32))
    assert two.isfinite().all()


def test_two_values_are_two_levels() -> None:
    W = torch.randn(32, 2).repeat_interleave(8, dim=1)
    for nbits in ALL_BITS:
        got = back(W, QuantSpec(nbits, 16, 1, "least_squares", torch.float32))
        torch.testing.assert_close(got, W, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("axis", [0, 1])
def test_non_finite_weights_are_refused_by_name_and_row(bad: float, axis: int) -> None:
    W = torch.randn(64, 32)
    W[37, 5] = bad
    spec = QuantSpec(2, 16, axis, "least_squares", torch.bfloat16)
    with pytest.raises(UserError, match=rf"^model\.x\.weight: row 37 holds {bad}"):
        quantize_weight(W, spec, name="model.x.weight")
    layout = spec.layout(64, 32)
    start, stop = (32, 48) if axis == 1 else (1, 3)
    rows = layout.rows_of(start, stop)
    with pytest.raises(UserError, match="row 37 "):
        quantize_weight(torch.cat([W[part] for part in rows]), spec, rows=rows)


def test_a_value_too_large_for_fp32_is_refused() -> None:
    W = torch.randn(4, 8, dtype=torch.float64)
    W[2, 3] = 1e300
    with pytest.raises(UserError, match="row 2 holds inf"):
        quantize_weight(W, QuantSpec(4, 8, 1, "rtn", torch.float32))


def test_the_input_is_not_modified_and_may_have_any_strides(solver: str) -> None:
    W = torch.randn(32, 48)
    for axis in (0, 1):
        spec, before = QuantSpec(3, None, axis, solver, torch.float32), W.clone()
        whole = quantize_weight(torch.nn.Parameter(W), spec)
        assert torch.equal(W, before)
        assert not whole.scale.requires_grad
        assert same_bits(whole, quantize_weight(W.T.contiguous().T, spec))
        assert same_bits(whole, quantize_weight(torch.cat([W, W], 1)[:, :48], spec))


CUTS = [(nbits, axis, g) for nbits in (8, 3, 1) for axis in (0, 1) for g in (8, 24, None)]


@pytest.mark.parametrize(("nbits", "axis", "group_size"), CUTS)
def test_same_bits_for_any_slice_and_chunk_size(
    solver: str, nbits: int, axis: int, group_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Weights so large that solver hqq shrinks residuals of some groups and not of others.
    W = torch.randn(24, 72) * torch.logspace(-3, 0.5, 24)[torch.randperm(24), None]
    spec = QuantSpec(nbits, group_size, axis, solver, torch.bfloat16)
    layout, whole = spec.layout(*W.shape), quantize_weight(W, spec)
    for start, stop in ((0, 1), (0, layout.units), (layout.units // 3, layout.units)):
        rows = torch.cat([W[part] for part in layout.rows_of(start, stop)])
        g = spec if group_size or axis == 1 else QuantSpec(nbits, 24, 0, solver, torch.bfloat16)
        part = quantize_weight(rows, g)
        cut = (whole.W_q[start:stop], whole.scale[start:stop], whole.zero[start:stop])
        assert same_bits(part, QuantizedWeight(*cut))
    module = sys.modules[quantize_weight.__module__]
    for chunk in (1, 500, 1 << 30):
        monkeypatch.setitem(module.CHUNK_WEIGHTS, "cpu", chunk)
        assert same_bits(quantize_weight(W, spec), whole)


@pytest.mark.parametrize(("solver", "axis"), [("least_squares", 1), ("hqq", 0)])
def test_same_bits_on_one_thread_and_two_with_a_long_group(solver: str, axis: int) -> None:
    # torch splits a single sum of more than 32768 numbers over threads.
    W = torch.randn((3, 40_001) if axis == 1 else (40_001, 3))
    spec = QuantSpec(1, None, axis, solver, torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(quantize_weight(W, spec))
            alone = quantize_weight(W[:1] if axis == 1 else W[:, :1], spec)
            results.append(alone)
    finally:
        torch.set_num_threads(threads)
    assert same_bits(results[0], results[2])
    assert same_bits(results[1], results[3])
    assert torch.equal(results[0].scale.flatten()[:1], results[1].scale.flatten())
    assert torch.equal(results[0].zero.flatten()[:1], results[1].zero.flatten())


def measure_peak(shape: tuple[int, int], axis: int, group_size: int | None, send: Any) -> None:
    """Send the bytes that a quantization takes at its peak. Runs in a process of its own."""

    def peak() -> int:
        status = Path("/proc/self/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) << 10

    torch.set_num_threads(1)
    spec = QuantSpec(2, group_size, axis, "least_squares", torch.bfloat16)
    quantize_weight(torch.randn(64, 64), spec)
    W = torch.randn(shape)
    # ru_maxrss would not do: a new process starts with the peak of the one that has started it.
    Path("/proc/self/clear_refs").write_text("5")  # the peak is the present size
    before = peak()
    quantize_weight(W, spec)
    send.send(peak() - before)


@pytest.mark.parametrize(
    "case", [((2048, 2048), 1, 64), ((2048, 2048), 0, None), ((64, 1 << 16), 1, None)], ids=str
)
def test_peak_memory_is_that_of_codes_and_of_a_chunk(case: tuple) -> None:
    receive, send = fork_context().Pipe(duplex=False)
    worker = fork_context().Process(target=measure_peak, args=(*case, send))
    worker.start()
    send.close()
    codes, chunk = math.prod(case[0]), 4 * CHUNK_WEIGHTS["cpu"]
    assert codes < receive.recv() < 1.5 * codes + 40 * chunk  # 12 to 32 chunks when measured
    worker.join()


def test_errors_add_up_over_slices() -> None:
    W, approximation = torch.randn(70, 30), torch.randn(70, 30)
    parts = [squared_error(W[a:b], approximation[a:b]) for a, b in ((0, 20), (20, 70))]
    assert sum(parts).tolist() == pytest.approx(squared_error(W, approximation).tolist(), rel=1e-12)
    expected = ((W - approximation).double().norm() / W.double().norm()) ** 2
    assert relative_error(W, approximation) == pytest.approx(expected.item(), rel=1e-6)
    assert relative_error(torch.zeros(2, 2), torch.zeros(2, 2)) == 0
    assert relative_error(torch.zeros(2, 2), torch.ones(2, 2)) == float("inf")
