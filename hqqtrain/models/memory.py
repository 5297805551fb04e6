"""Measure what is free on this machine: memory of device and host, and disk space."""

from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Available:
    """Free bytes. `device` is None if the model is in the host's memory."""

    host: int
    disk: int
    device: int | None = None


def available(device: torch.device | str, folder: Path) -> Available:
    """Return the free memory of `device` and host, and the free disk space for `folder`.

    `folder` need not exist yet.
    """
    device = torch.device(device)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    parents = (folder.absolute(), *folder.absolute().parents)
    existing = next(path for path in parents if path.exists())
    return Available(free_host_memory(), disk_usage(existing).free, free)


def free_host_memory() -> int:
    """Return the bytes that can be allocated without swapping, within the limits of cgroups.

    psutil reports the whole machine, but slurm and containers grant only a part of it.
    """
    return min([psutil.virtual_memory().available, *_cgroup_limits()])


def _cgroup_limits() -> list[int]:
    """Return the memory limits of this process's cgroup (version 2) and of its parents."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    own_group = next((line[3:] for line in lines if line.startswith("0::")), "/")
    folder = _CGROUP / own_group.strip("/")
    groups = [folder, *(p for p in folder.parents if p.is_relative_to(_CGROUP))]
    return [limit for group in groups if (limit := _limit(group / "memory.max")) is not None]


def _limit(path: Path) -> int | None:
    """Return the limit in a memory.max file, or None if it says "max" or cannot be read."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
