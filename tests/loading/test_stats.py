"""Loading statistics: rates, the peak of the host's memory, and the line in the log."""

from types import SimpleNamespace

import pytest
import torch

from hqqtrain.loading.stats import GIB, LoadStats, MemoryTracker

STATS = LoadStats(1, 4 * 10**9, 1.5, 2.0, 3.25, 0.0)


def test_the_rate_is_over_the_whole_loading_time():
    assert STATS.gb_per_second == 2.0
    assert LoadStats(0, 5, 0.0, 0.0, 0.0, 0.0).gb_per_second == 0.0
    assert STATS.to_json() == {
        "rank": 1, "bytes_read": 4 * 10**9, "read_seconds": 1.5, "seconds": 2.0,
        "host_peak_gib": 3.25, "device_peak_gib": 0.0, "gb_per_second": 2.0,
    }  # fmt: skip


@pytest.mark.parametrize(("gpu", "memory"), [
    (0.0, "3.25 GiB of host memory"), (1.5, "3.25 GiB of host memory and 1.50 GiB of GPU memory"),
])  # fmt: skip
def test_the_line_in_the_log(gpu: float, memory: str):
    stats = LoadStats(1, 4 * 10**9, 1.5, 2.0, 3.25, gpu)
    assert str(stats) == (
        f"rank 1: loaded 4.00 GB in 2.0 s (2.00 GB/s; reading took 1.5 s), peak {memory}"
    )


def test_the_peak_is_the_largest_sample_without_shared_memory(monkeypatch):
    samples = iter([(2 * GIB, 0), (9 * GIB, 4 * GIB), (3 * GIB, 0)])

    class Process:
        def memory_info(self) -> SimpleNamespace:
            rss, shared = next(samples)
            return SimpleNamespace(rss=rss, shared=shared)

    monkeypatch.setattr("hqqtrain.loading.stats.psutil.Process", Process)
    tracker = MemoryTracker(torch.device("cpu"))
    tracker.sample()
    assert tracker.stats(0, 7, 0.5, 1.0) == LoadStats(0, 7, 0.5, 1.0, 5.0, 0.0)
