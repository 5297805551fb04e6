"""Everything through Triton, whatever the device: see tests/conftest.py."""

from collections.abc import Iterator

import pytest
import torch

from hqqtrain_kernels import select


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def triton_backend() -> Iterator[None]:
    select.use("triton")
    yield
    select.use("auto")
