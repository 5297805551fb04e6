"""Fixtures that make Triton kernels compute on any device: see also tests/conftest.py."""

from collections.abc import Iterator

import pytest
import torch

from hqqtrain_kernels import backend, heuristics


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def triton_backend() -> Iterator[None]:
    backend.set_backend("triton")
    yield
    backend.set_backend("auto")


@pytest.fixture(params=["torch", "triton"])
def each_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run a test with the code in plain PyTorch, and with the kernels."""
    if request.param == "triton":
        pytest.importorskip("triton", reason="Triton is not installed here")
    backend.set_backend(request.param)
    yield
    backend.set_backend("auto")


@pytest.fixture
def small_layers_too(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let `heuristics` select kernels for layers small enough for the interpreter."""
    monkeypatch.setattr(heuristics, "MIN_OUT_FEATURES_32", 1)
    monkeypatch.setattr(heuristics, "MIN_OUT_FEATURES_ONE_ROW", 1)
    heuristics.select_kernel.cache_clear()
    yield
    heuristics.select_kernel.cache_clear()
