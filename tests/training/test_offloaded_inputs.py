"""Inputs in host memory: they return in any order, and few of them are on the device at a time."""

import gc

import pytest
import torch

from hqqtrain.training import offloaded_inputs
from hqqtrain.training.offloaded_inputs import OffloadedInputs


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> OffloadedInputs:
    monkeypatch.setattr(offloaded_inputs, "MIN_NUMEL", 4)
    monkeypatch.setattr(OffloadedInputs, "copies_on_cpu", True)
    return OffloadedInputs()


def on_device(saved: list) -> list[int]:
    return [index for index, copy in enumerate(saved) if copy._on_device is not None]


def test_the_next_input_is_fetched_ahead(host: OffloadedInputs) -> None:
    tensors = [torch.full((2, 3), float(index)) for index in range(5)]
    saved = [host.pack(tensor) for tensor in tensors]
    assert on_device(saved) == [3, 4], "the last two are needed first"
    held = []
    for index in reversed(range(5)):
        assert torch.equal(host.unpack(saved[index]), tensors[index])
        held.append(on_device(saved))
    assert held == [[3], [2], [1], [0], []]


def test_inputs_return_in_any_order_and_more_than_once(host: OffloadedInputs) -> None:
    tensors = [torch.full((2, 3), index, dtype=torch.int16) for index in range(5)]
    saved = [host.pack(tensor) for tensor in tensors]
    for index in (2, 4, 0, 3, 3, 1, 2):
        assert torch.equal(host.unpack(saved[index]), tensors[index])


def test_buffers_are_used_again(host: OffloadedInputs) -> None:
    for size in (8, 8, 4, 16, 16):
        saved = [host.pack(torch.ones(size)) for _ in range(4)]
        while saved:
            host.unpack(saved.pop())
        gc.collect()
        assert len(host._free) == 4
    assert {len(buffer) for buffer in host._free} == {64}, "each has grown with the tensors"


def test_a_pass_without_a_backward_pass_keeps_nothing(host: OffloadedInputs) -> None:
    for _ in range(3):
        saved = [host.pack(torch.ones(8)) for _ in range(4)]
        del saved
    gc.collect()
    assert len(host._free) <= 6
    last = host.pack(torch.zeros(8))
    assert torch.equal(host.unpack(last), torch.zeros(8))


def test_small_tensors_stay(host: OffloadedInputs) -> None:
    small = torch.ones(3)
    assert host.pack(small) is small
    assert host.unpack(small) is small


@pytest.mark.gpu
def test_copies_of_a_gpu_are_exact_while_it_computes() -> None:
    """Work that overwrites freed memory at once does not change what is copied."""
    host, size = OffloadedInputs(), (1024, 1024)
    torch.manual_seed(0)
    x, wanted, saved = torch.randn(size, device="cuda"), [], []
    weight = torch.randn(1024, 1024, device="cuda") / 32
    for _ in range(24):
        saved.append(host.pack(x))
        wanted.append(x.sum(dtype=torch.float64))
        x = torch.tanh(x @ weight)
    sums = []
    while saved:
        found = host.unpack(saved.pop())
        sums.append(found.sum(dtype=torch.float64))
        del found
        torch.tanh(x @ weight)
    assert torch.equal(torch.stack(sums[::-1]), torch.stack(wanted))
