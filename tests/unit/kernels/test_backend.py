"""The choice of the backend."""

from collections.abc import Iterator

import pytest
import torch

from hqqtrain_kernels import backend

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _back_to_auto() -> Iterator[None]:
    yield
    backend.set_backend("auto")


def test_torch_never_uses_triton() -> None:
    assert backend.set_backend("torch") == "torch: requested"
    assert not backend.use_triton(CPU)


def test_auto_never_selects_the_interpreter() -> None:
    backend.set_backend("auto")
    assert not backend.use_triton(CPU)


def test_triton_may_be_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed here")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.set_backend("triton") == "triton: requested"
    assert backend.use_triton(CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the obstacle is that no GPU is here")
def test_errors_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"backend=triton: the device is cpu.*Use backend=auto"):
        backend.set_backend("triton")
    with pytest.raises(ValueError, match="backend=cuda: allowed are auto, triton, torch"):
        backend.set_backend("cuda")
