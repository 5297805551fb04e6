"""Copies of offloaded tensors never race with the work that uses them, whatever order it has."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from hqqtrain.nn.staging import ALIGNMENT, StagedTensors

CPU = torch.device("cpu")


class LateStream:
    """A stream whose work runs when a random scheduler chooses it, as late as a GPU may run it."""

    def __init__(self, *_: object) -> None:
        self.work: list[Callable[[], object] | tuple[LateStream, int]] = []
        self.done = 0
        STREAMS.append(self)

    def wait_stream(self, other: "LateStream") -> None:
        self.work.append((other, len(other.work)))

    def can_go_on(self) -> bool:
        if self.done == len(self.work):
            return False
        step = self.work[self.done]
        return callable(step) or step[0].done >= step[1]

    def go_on(self) -> None:
        step = self.work[self.done]
        if callable(step):
            step()
        self.done += 1


STREAMS: list[LateStream] = []


class Queued(TorchFunctionMode):
    """Adds copies to a stream instead of running them."""

    def __init__(self, stream: LateStream) -> None:
        super().__init__()
        self.stream = stream

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.Tensor.copy_:
            return func(*args, **(kwargs or {}))
        assert kwargs == {"non_blocking": True}
        self.stream.work.append(lambda: args[0].copy_(args[1]))
        return args[0]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A device with streams that run late; `current` is the stream of new work."""
    STREAMS.clear()

    @contextmanager
    def stream(chosen: LateStream) -> Iterator[None]:
        with Queued(chosen):
            yield

    module = SimpleNamespace(Stream=LateStream, stream=stream, current=LateStream())
    module.current_stream = lambda _: module.current
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    monkeypatch.setattr(StagedTensors, "copies_on_cpu", True)
    return module


def groups_of(count: int) -> list[list[torch.Tensor]]:
    return [
        [torch.full((3, 5), i, dtype=torch.uint8), torch.full((7,), i + 0.5, dtype=torch.bfloat16)]
        for i in range(count)
    ]


def staged_groups(count: int) -> StagedTensors:
    staged = StagedTensors()
    assert [staged.add(group)[0] for group in groups_of(count)] == list(range(count))
    return staged


def compare(got: list[torch.Tensor], expected: list[torch.Tensor], wrong: list[int]) -> None:
    """Add the number of a group to `wrong` if its tensors have other values."""
    if not all(map(torch.equal, got, expected)):
        wrong.append(int(expected[0][0, 0]))


FORWARD = [0, 0, 1, 2, 3, 4] * 3
BACKWARD = [4, 3, 3, 2, 1, 0]


@pytest.mark.parametrize("order", [
    FORWARD, FORWARD + BACKWARD + FORWARD, [3, 0, 0, 4, 1, 3, 2, 2, 0, 4],
])  # fmt: skip
@pytest.mark.parametrize("count_streams", [1, 2])
def test_no_schedule_gives_other_values(
    device: SimpleNamespace, order: list[int], count_streams: int
) -> None:
    chooser = random.Random(0)
    for _ in range(40):
        STREAMS.clear()
        users = [LateStream() for _ in range(count_streams)]
        staged, expected, wrong = staged_groups(5), groups_of(5), list[int]()

        for index in order:
            device.current = chooser.choice(users)
            tensors = staged.fetch(index, CPU)
            device.current.work.append(partial(compare, tensors, expected[index], wrong))
        while ready := [stream for stream in STREAMS if stream.can_go_on()]:
            chooser.choice(ready).go_on()
        assert all(stream.done == len(stream.work) for stream in STREAMS), "a deadlock"
        assert not wrong


def test_the_next_group_is_copied_ahead(device: SimpleNamespace) -> None:
    staged = staged_groups(5)
    copied = []
    for index in (0, 1, 2, 3, 4, 0, 1):
        before = sum(map(callable, STREAMS[1].work)) if len(STREAMS) > 1 else 0
        staged.fetch(index, CPU)
        copied.append(sum(map(callable, STREAMS[1].work)) - before)
    assert copied == [2, 1, 1, 1, 1, 1, 1], "only the first group is waited for"
    copies = STREAMS[1].work
    before = len([step for step in copies if callable(step)])
    for index in (0, 4, 3, 2):
        staged.fetch(index, CPU)
    assert len([step for step in copies if callable(step)]) - before <= 6


def test_tensors_are_aligned_and_adjacent_in_host_memory() -> None:
    staged = StagedTensors()
    index, hosts = staged.add([torch.ones(3), torch.ones((2, 4), dtype=torch.float16)])
    assert hosts[1].data_ptr() - hosts[0].data_ptr() == ALIGNMENT
    assert [host.dtype for host in hosts] == [torch.float32, torch.float16]
    assert staged.fetch(index, CPU) is hosts, "a CPU needs no copy"


@pytest.mark.gpu
def test_twenty_passes_over_random_groups_have_the_right_bits() -> None:
    device, chooser, staged = torch.device("cuda", 0), random.Random(0), StagedTensors()
    values = [torch.randint(0, 256, (1 << 23,), dtype=torch.uint8) for _ in range(16)]
    for value in values:
        staged.add([value, value.view(torch.bfloat16)])
    expected = [value.to(device) for value in values]
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    work = torch.randn(2048, 2048, device=device)
    other = torch.cuda.Stream(device)
    for number in range(20):
        order = list(range(16)) if number % 2 else [chooser.randrange(16) for _ in range(32)]
        for index in order if number % 4 else reversed(order):
            stream = other if number % 5 == 4 else torch.cuda.current_stream(device)
            with torch.cuda.stream(stream):
                first, second = staged.fetch(index, device)
                for _ in range(chooser.randrange(3)):
                    work = (work @ work).clamp(-1, 1)  # the use is late
                wrong += (first != expected[index]).sum()
                wrong += (second.view(torch.uint8) != expected[index]).sum()
        torch.cuda.synchronize(device)
    assert wrong.item() == 0
