"""A solver without a kernel runs in torch, also where Triton kernels run."""

import logging
from dataclasses import replace

import pytest
import torch

from hqqtrain.quant import triton_backend
from hqqtrain.quant.grid import group_ranges
from hqqtrain.quant.quantize import dequantize_weight, quantize_weight
from hqqtrain.quant.solvers.registry import SOLVERS, Solver
from hqqtrain.quant.spec import QuantSpec

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _round_to_nearest(W, grid):
    """Fit the codes to the group's range, as `rtn` does, without a kernel."""
    low, value_range = group_ranges(W)
    scale = value_range / grid.max_code
    return scale, -low / scale


@pytest.fixture
def torch_only(monkeypatch: pytest.MonkeyPatch) -> str:
    """Register a solver without a kernel, on a machine where kernels run."""
    monkeypatch.setitem(SOLVERS, "torch_only", Solver("torch_only", _round_to_nearest))
    monkeypatch.setattr(triton_backend.backend, "use_triton", lambda device: True)
    triton_backend._warn_no_kernel.cache_clear()
    return "torch_only"


def test_a_solver_without_a_kernel_runs_in_torch(torch_only: str, caplog):
    W, spec = torch.randn(64, 64, device=DEVICE), QuantSpec(8, 64, 1, torch_only, torch.float32)
    layout = spec.layout(64, 64)
    rtn = QuantSpec(8, 64, 1, "rtn", torch.float32)
    assert triton_backend.is_supported(DEVICE, layout, rtn)
    assert not triton_backend.is_supported(DEVICE, layout, replace(rtn, zero="integer"))
    with caplog.at_level(logging.WARNING):
        assert not triton_backend.is_supported(DEVICE, layout, spec)
        for _ in range(2):
            back = dequantize_weight(quantize_weight(W, spec), layout, torch.float32)
    torch.testing.assert_close(back, W, atol=0.02, rtol=0)
    (record,) = [r for r in caplog.records if "torch_only" in r.message]
    assert record.message == (
        "solver torch_only has no kernel (least_squares, gptq, hqq, rtn have one); torch runs it, "
        "which is slower"
    )


def test_a_long_group_runs_in_torch(torch_only: str):
    length = 2 * triton_backend.MAX_GROUP_SIZE
    spec = QuantSpec(8, None, 1, "rtn", torch.float32)
    assert not triton_backend.is_supported(DEVICE, spec.layout(1, length), spec)
