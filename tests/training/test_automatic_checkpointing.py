"""`auto` lets as many layers keep their activations as the memory has room for."""

import logging

import pytest
import torch
from torch import Tensor, nn

from hqqtrain.distributed.comm import SINGLE_PROCESS
from hqqtrain.training.automatic_checkpointing import RESERVE, AutomaticCheckpointing, GPUMemory

KEPT, INPUT, LOSS, WEIGHTS, STATE = 1000, 100, 300, 5000, 200


class _Memory:
    """A simulated device of `size` bytes."""

    def __init__(self, size: int) -> None:
        self.size, self.now, self.highest = size, WEIGHTS, 10**9  # the evaluation's peak

    def allocate(self, nbytes: int) -> None:
        self.now += nbytes
        self.highest = max(self.highest, self.now)

    def allocated(self) -> int:
        return self.now

    def peak(self) -> int:
        return self.highest

    def reset_peak(self) -> None:
        self.highest = self.now

    def usable(self) -> int:
        return self.size


class _Layer(nn.Module):
    """A layer whose forward pass allocates its input, or all of its activations."""

    gradient_checkpointing = True

    def __init__(self, memory: _Memory) -> None:
        super().__init__()
        self.memory = memory

    def forward(self, x: Tensor) -> Tensor:
        size = INPUT if self.gradient_checkpointing else KEPT
        self.memory.allocate(size * x.numel() // 100)  # x has 100 elements in a full batch
        return x + 0


def take_step(memory: _Memory, layers: list[nn.Module], tokens: int = 25) -> None:
    """Simulate a step of one micro-batch of [1, tokens, 4 bytes]."""
    before, x = memory.now, torch.zeros(1, tokens, 1)
    x = x.repeat(1, 1, 4)
    for layer in layers:
        x = layer(x)
    memory.allocate(LOSS * tokens // 25)
    if layers[-1].gradient_checkpointing:
        memory.allocate(KEPT * tokens // 25)
    memory.now = before


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch):
    """Return a function that decides for a device of a size and returns it and its layers."""
    # The simulated tensors are smaller than the bytes that they stand for.
    monkeypatch.setattr(Tensor, "nbytes", property(lambda x: INPUT * x.numel() // 100))

    def decide(size: int, tokens: int = 25, comm=SINGLE_PROCESS) -> tuple[_Memory, list]:
        memory = _Memory(size)
        layers: list[nn.Module] = [_Layer(memory) for _ in range(8)]
        automatic = AutomaticCheckpointing(layers, memory, comm, max_tokens=25)
        take_step(memory, layers, tokens)
        memory.allocate(STATE)
        automatic.after_step()
        return memory, layers

    return decide


def recomputed(layers: list) -> list[bool]:
    return [layer.gradient_checkpointing for layer in layers]


@pytest.mark.parametrize("kept", range(1, 9))
def test_the_peak_stays_below_the_limit(simulate, kept: int) -> None:
    """With room for `kept` layers, that many keep their activations, and one more would not fit."""
    peak = WEIGHTS + STATE + LOSS + kept * KEPT + (8 - kept) * INPUT
    for size, expected in ((peak + 8, kept), (peak - 8, kept - 1)):
        memory, layers = simulate(int(size / (1 - RESERVE)))
        assert recomputed(layers) == [True] * (8 - expected) + [False] * expected
        memory.reset_peak()
        take_step(memory, layers)
        assert memory.highest <= max(size, peak - KEPT + INPUT) + KEPT * (expected == 0)


def test_shorter_batches_of_the_first_step_are_scaled(simulate) -> None:
    size = (WEIGHTS + STATE + LOSS + 4 * KEPT + 4 * INPUT + 20) / (1 - RESERVE)
    for tokens in (5, 10, 25):
        _, layers = simulate(int(size), tokens)
        assert recomputed(layers) == [True] * 4 + [False] * 4, tokens


def test_all_ranks_take_the_number_of_the_fullest(simulate, caplog) -> None:
    class TwoRanks:
        is_main = True

        def all_gather_object(self, value: int) -> list[int]:
            return [value, 6]

    with caplog.at_level(logging.INFO):
        _, layers = simulate(10**6, comm=TwoRanks())
    assert recomputed(layers) == [True] * 6 + [False] * 2
    assert "train.activation_checkpointing=auto: 6 of 8 decoder layers recompute" in caplog.text


def test_it_decides_once(simulate) -> None:
    memory = _Memory(10**6)
    layers: list[nn.Module] = [_Layer(memory) for _ in range(8)]
    automatic = AutomaticCheckpointing(layers, memory, SINGLE_PROCESS, max_tokens=25)
    take_step(memory, layers)
    automatic.after_step()
    assert not any(recomputed(layers))
    memory.size = 0
    automatic.after_step()
    assert not any(recomputed(layers))


@pytest.mark.gpu
def test_the_usable_memory_of_a_gpu_ends_at_the_fraction_of_the_process() -> None:
    memory = GPUMemory(torch.device("cuda"))
    total = torch.cuda.mem_get_info()[1]
    kept = torch.ones(1 << 20, device="cuda")
    assert kept.nbytes <= memory.allocated() <= memory.peak() <= memory.usable() <= total
    torch.cuda.set_per_process_memory_fraction(0.01)
    try:
        assert memory.usable() == int(total * 0.01)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_gpu_without_an_index_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "memory_allocated", asked.append)
    for device in ("cuda", "cuda:1"):
        GPUMemory(torch.device(device)).allocated()
    assert asked == [torch.device("cuda:3"), torch.device("cuda:1")]
