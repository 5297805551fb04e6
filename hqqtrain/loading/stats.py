"""Statistics of loading per rank, to see which disk, link or memory was the bottleneck."""

from dataclasses import asdict, dataclass

import psutil
import torch

from hqqtrain.common.text import short

GIB = 2**30


@dataclass(frozen=True)
class LoadStats:
    """Loading statistics of one rank.

    Attributes:
        rank: The rank.
        bytes_read: Bytes of weights that the rank has read.
        read_seconds: The part of `seconds` in which the rank was reading. It overlaps with
            quantizing.
        seconds: The whole loading time.
        host_peak_gib: Peak of the process's private memory, sampled after each read. Memory-mapped
            files are not counted.
        device_peak_gib: Peak of the GPU memory; 0 without a GPU.
    """

    rank: int
    bytes_read: int
    read_seconds: float
    seconds: float
    host_peak_gib: float
    device_peak_gib: float

    @property
    def gb_per_second(self) -> float:
        """Bytes read, in units of 10^9 per second, over the whole loading time."""
        return self.bytes_read / 1e9 / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, float]:
        """Return all fields and the throughput as JSON values."""
        return asdict(self) | {"gb_per_second": self.gb_per_second}

    def __str__(self) -> str:
        memory = f"{self.host_peak_gib:.2f} GiB of host memory"
        if self.device_peak_gib:
            memory += f" and {self.device_peak_gib:.2f} GiB of GPU memory"
        return (
            f"rank {self.rank}: loaded {short(self.bytes_read / 1e9)} GB in {self.seconds:.1f} s "
            f"({short(self.gb_per_second)} GB/s; reading took {self.read_seconds:.1f} s), peak "
            f"{memory}"
        )


class MemoryTracker:
    """Tracks the peak memory of this process, and of the GPU if `device` is one."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._process, self._host_peak_bytes = device, psutil.Process(), 0
        self.sample()

    def sample(self) -> None:
        """Sample the host's RSS and keep its maximum; PyTorch already tracks the GPU peak."""
        info = self._process.memory_info()
        private_bytes = info.rss - getattr(info, "shared", 0)  # psutil has `shared` on Linux only
        self._host_peak_bytes = max(self._host_peak_bytes, private_bytes)

    def stats(self, rank: int, bytes_read: int, read_seconds: float, seconds: float) -> LoadStats:
        """Return the statistics of this rank, with the peaks so far."""
        self.sample()
        on_gpu = self._device.type == "cuda"
        device_peak_bytes = torch.cuda.max_memory_allocated(self._device) if on_gpu else 0
        return LoadStats(
            rank,
            bytes_read,
            read_seconds,
            seconds,
            host_peak_gib=self._host_peak_bytes / GIB,
            device_peak_gib=device_peak_bytes / GIB,
        )
