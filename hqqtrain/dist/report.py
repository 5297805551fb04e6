"""What loading took, rank by rank: which disk, which link, which memory was the narrow one."""

from dataclasses import asdict, dataclass

import psutil
import torch

GIB = 2**30


@dataclass(frozen=True)
class LoadReport:
    """Of one rank. `read_seconds` lie within `seconds`, beside the quantizing. The host's memory
    is its own (files mapped into memory are not counted), looked at after each read."""

    rank: int
    bytes_read: int
    read_seconds: float
    seconds: float
    host_peak_gib: float
    device_peak_gib: float

    @property
    def gb_per_second(self) -> float:
        """10^9 bytes of the source a second, of the whole time."""
        return self.bytes_read / 1e9 / self.seconds if self.seconds else 0.0

    def facts(self) -> dict[str, float]:
        """All of it, as JSON values."""
        return asdict(self) | {"gb_per_second": self.gb_per_second}

    def __str__(self) -> str:
        memory = f"{self.host_peak_gib:.2f} GiB of the host's memory"
        if self.device_peak_gib:
            memory += f" and {self.device_peak_gib:.2f} of the GPU's"
        return (
            f"rank {self.rank}: {self.bytes_read / 1e9:.2f} GB in {self.seconds:.1f} s "
            f"({self.gb_per_second:.2f} GB/s; reading took {self.read_seconds:.1f} s), at most "
            f"{memory}"
        )


class Memory:
    """Looks at this process's memory, and at the GPU's if `device` is one."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._process, self._peak = device, psutil.Process(), 0
        self.look()

    def look(self) -> None:
        """Of the GPU torch keeps the peak; of the host this does."""
        info = self._process.memory_info()
        self._peak = max(self._peak, info.rss - getattr(info, "shared", 0))

    def report(self, rank: int, bytes_read: int, read_seconds: float, seconds: float) -> LoadReport:
        """With the peaks so far."""
        self.look()
        on_gpu = self._device.type == "cuda"
        device = torch.cuda.max_memory_allocated(self._device) if on_gpu else 0
        return LoadReport(rank, bytes_read, read_seconds, seconds, self._peak / GIB, device / GIB)
