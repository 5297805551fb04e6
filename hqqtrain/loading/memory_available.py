"""What this machine has: free memory of the device and the host, free space on disk."""

from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class AvailableMemory:
    """Free bytes. `device` is None where the model lives in the host's memory."""

    host: int
    disk: int
    device: int | None = None


def available_memory(device: torch.device | str, folder: Path) -> AvailableMemory:
    """Free memory of `device` and the host, and free space where `folder` is or will be."""
    device = torch.device(device)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    return AvailableMemory(free_host_memory(), disk_usage(_existing(folder)).free, free)


def free_host_memory() -> int:
    """Bytes that can be allocated without swapping, within the limits of cgroups.

    psutil sees the machine; slurm and containers grant a part of it.
    """
    return min([psutil.virtual_memory().available, *_cgroup_limits()])


def _cgroup_limits() -> list[int]:
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    own = next((line[3:] for line in lines if line.startswith("0::")), "/")
    folder = _CGROUP / own.strip("/")
    groups = [folder, *(p for p in folder.parents if p.is_relative_to(_CGROUP))]
    return [limit for group in groups if (limit := _limit(group / "memory.max")) is not None]


def _limit(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _existing(folder: Path) -> Path:
    return next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
