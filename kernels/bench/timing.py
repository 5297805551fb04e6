"""Timing that makes the providers of one run comparable.

Providers take turns, round after round, so that a GPU that heats up slows all of them alike. A
round is a batch of calls, and the result is the median over the rounds. On a GPU a batch is queued
behind a sleep, so that its calls follow each other without a gap: this measures GPU time, as if
Python cost nothing. (`host_medians` measures the cost of Python.) No call finds its data in the L2
cache: callers rotate copies (`copies_beyond_cache`), as the layers of a model do.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Call = Callable[[], object]

BATCH_SECONDS, MAX_CALLS = 0.015, 200
"""Duration of a batch, and upper bound of its calls."""
SLOW_SECONDS = 1.5
"""Upper bound of the time of all rounds of one provider."""
MAX_SLEEP_SECONDS, CLOCK_HZ = 0.05, 2e9
"""Upper bound of the sleep that a batch is queued behind, and the clock rate that converts it."""
HOST_CALLS = 50
"""Calls of a batch that measures the cost of Python."""


@dataclass(frozen=True)
class Limits:
    """The measured limits of the machine.

    Attributes:
        bandwidth: Bytes per second of a copy, which counts both the bytes read and those written.
        operations: Operations per second of a bf16 matrix product.
    """

    bandwidth: float
    operations: float

    def ms(self, moved: float, operations: float = 0) -> float:
        """Return the least time in ms to move `moved` bytes and to do `operations` operations."""
        return 1e3 * max(moved / self.bandwidth, operations / self.operations)


def limits(device: torch.device, size: int) -> Limits:
    """Measure the limits by a copy of size^2 fp32 numbers, and a bf16 product of that size."""
    source = torch.randn(size, size, device=device)
    target = torch.empty_like(source)
    a, b = (source.to(torch.bfloat16), torch.randn_like(source).to(torch.bfloat16))
    milliseconds = medians(
        {"copy": lambda: target.copy_(source), "product": lambda: a @ b}, device, 9
    )
    moved, operations = 2 * source.nbytes, 2 * size**3
    return Limits(moved / milliseconds["copy"] * 1e3, operations / milliseconds["product"] * 1e3)


def medians(calls: Mapping[str, Call], device: torch.device, rounds: int) -> dict[str, float]:
    """Return the milliseconds per call of each of `calls`, which take turns."""
    batches = {name: _Batch(call, device) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name, batch in batches.items():
            if number < batch.most_rounds:
                times[name].append(batch.seconds_per_call())
    return {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()}


class _Batch:
    """A batch of calls, long enough to time; two untimed calls before it compile and allocate."""

    def __init__(self, call: Call, device: torch.device) -> None:
        self.call, self.on_gpu = call, device.type == "cuda"
        call()
        self._wait()
        began = time.perf_counter()
        call()
        self.host_seconds = time.perf_counter() - began
        self._wait()
        seconds = time.perf_counter() - began
        self.count = min(MAX_CALLS, max(1, int(BATCH_SECONDS / seconds)))
        self.most_rounds = max(1, int(SLOW_SECONDS / (self.count * seconds)))

    def seconds_per_call(self) -> float:
        return (self._gpu() if self.on_gpu else self._wall()) / self.count

    def _gpu(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._wait()
        # Sleep for longer than Python takes to queue the batch.
        sleep_seconds = min(MAX_SLEEP_SECONDS, 1.5 * self.host_seconds * self.count)
        torch.cuda._sleep(int(sleep_seconds * CLOCK_HZ))
        start.record()
        for _ in range(self.count):
            self.call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def _wall(self) -> float:
        began = time.perf_counter()
        for _ in range(self.count):
            self.call()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def host_medians(calls: Mapping[str, Call], device: torch.device, rounds: int) -> dict[str, float]:
    """Return the wall time in ms per call without synchronization, the median over rounds.

    For a layer so small that the GPU is always ahead, this is the cost of Python and the launch.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(HOST_CALLS):
                call()
            times[name].append((time.perf_counter() - began) / HOST_CALLS)
    return {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()}


def copies_beyond_cache(size: int, device: torch.device) -> int:
    """Return how many copies of `size` bytes to rotate to evict the first from the L2 cache."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return 1 + -(-2 * cache // size)
