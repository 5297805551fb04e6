"""Everything through Triton, whatever the device: see tests/conftest.py."""

from collections.abc import Iterator

import pytest
import torch

from hqqtrain_kernels import select, table


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def triton_backend() -> Iterator[None]:
    select.use("triton")
    yield
    select.use("auto")


@pytest.fixture
def small_layers_too(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets `table` choose for layers that the interpreter can do."""
    monkeypatch.setattr(table, "LEAST", 1)
    table.choose.cache_clear()
    yield
    table.choose.cache_clear()
