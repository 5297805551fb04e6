"""Which weights the kernels quantize, and which ones PyTorch does."""

import logging

import pytest
import torch
from torch import Tensor

from hqqtrain.quant import QuantSpec, fused, quantize
from hqqtrain.quant.grid import Grid
from hqqtrain.quant.solvers import SOLVERS
from hqqtrain_kernels import Layout, backend
from hqqtrain_kernels.solver_params import SUPPORTED_SOLVERS

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behave as on a GPU; `_warn_*` may have warned in another test."""
    monkeypatch.setattr(backend, "use_triton", lambda device: True)
    fused._warn_no_kernel.cache_clear()
    fused._warn_group_too_long.cache_clear()


@pytest.mark.parametrize("solver", SUPPORTED_SOLVERS)
def test_supported_solvers_run_in_the_kernel_up_to_its_largest_group(solver: str) -> None:
    assert fused.is_supported(CPU, Layout(8, 64, 4, 64, 1), solver)
    longest = Layout(1, 2 * fused.LARGEST_GROUP, 4, 2 * fused.LARGEST_GROUP, 1)
    assert not fused.is_supported(CPU, longest, solver)
    params = fused._solver_params(solver, nbits=4, group_size=64)
    assert type(params) is SUPPORTED_SOLVERS[solver]


def test_a_solver_without_a_kernel_runs_in_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def half_range(W: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        scale, zero = SOLVERS["rtn"](W, grid)
        return scale / 2, zero

    monkeypatch.setitem(SOLVERS, "half_range", half_range)
    W = torch.randn(8, 64)
    spec = QuantSpec(4, 64, 1, "half_range", torch.float32)
    with caplog.at_level(logging.WARNING, logger=fused.__name__):
        result, again = quantize(W, spec), quantize(W, spec)
    monkeypatch.setattr(backend, "use_triton", lambda device: False)
    expected = quantize(W, spec)
    for name in ("W_q", "scale", "zero"):
        assert torch.equal(getattr(result, name), getattr(expected, name))
        assert torch.equal(getattr(again, name), getattr(expected, name))
    assert [record.message for record in caplog.records] == [
        "solver half_range has no kernel (rtn, hqq, least_squares have one); torch runs it, which "
        "is slower"
    ]
