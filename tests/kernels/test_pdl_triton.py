"""Only GPUs that know programmatic dependent launch get it, and every kernel that has it waits."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed here")
from kernel_weights import DEVICE

from hqqtrain_kernels import pdl_triton
from hqqtrain_kernels.launcher_triton import CachedKernel
from hqqtrain_kernels.pdl_triton import supports_pdl


@pytest.mark.parametrize(("capability", "expected"), [((8, 9), False), ((9, 0), True)])
def test_it_needs_compute_capability_9(monkeypatch, capability, expected):
    monkeypatch.setattr(pdl_triton, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert supports_pdl.__wrapped__(torch.device("cuda", 0)) is expected


def test_the_interpreter_has_none():
    if DEVICE == "cpu":
        assert not supports_pdl(torch.device("cpu"))


@pytest.mark.parametrize("pdl", [False, True])
def test_a_kernel_is_launched_as_its_constants_say(pdl):
    given = []

    class Kernel:
        def __init__(self) -> None:
            self.arg_names = ["x_ptr", "PDL"]

        def __getitem__(self, grid: tuple[int, ...]):
            return lambda **arguments: given.append(arguments)

    CachedKernel(Kernel(), {"PDL": pdl}).launch(
        grid=(1, 1, 1), tensors={"x_ptr": torch.zeros(1)}, integers={}
    )
    assert given[0].get("launch_pdl", False) is pdl
