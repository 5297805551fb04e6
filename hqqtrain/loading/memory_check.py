"""Compare the estimate of a run with the memory and disk that are free.

A run that cannot fit is refused; one that may not fit gives a warning. Both name the keys that
reduce the need.
"""

from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage

import psutil
import torch

from hqqtrain.common.errors import UserError
from hqqtrain.distributed.strategies.base import Strategy
from hqqtrain.loading.memory_estimate import GIB, MemoryEstimate, Workload

_CGROUP = Path("/sys/fs/cgroup")

TIGHT = 0.9
"""Above this fraction of the free memory, the estimate is too coarse to promise a fit."""

# The parts whose size is exact.
_CERTAIN = ("packed weights", "dense weights", "adapter and optimizer", "reference model")

_HELP = {
    "packed weights": "lower quant.nbits={w.nbits}, or more GPUs with parallel.strategy=fsdp2",
    "dense weights": "more GPUs with parallel.strategy=fsdp2, or a shorter quant.skip",
    "reference model": "eval.reference=off",
    "adapter and optimizer": "optim.name=paged_adamw_8bit, "
    "adapter.dtype=bf16 or a smaller adapter.r={w.adapter_rank}",
    "activations": "a smaller train.micro_batch_size={w.micro_batch_size} or "
    "train.max_seq_len={w.max_seq_len}, and train.activation_checkpointing=true with "
    "parallel.offload=activations",
    "logits": "a smaller train.micro_batch_size={w.micro_batch_size} or "
    "train.max_seq_len={w.max_seq_len}",
    "working memory": "more GPUs with parallel.strategy=fsdp2",
}


@dataclass(frozen=True)
class AvailableMemory:
    """Free bytes. `device` is None if the model is in the host's memory."""

    host: int
    disk: int
    device: int | None = None


def check_fits(
    estimate: MemoryEstimate, free: AvailableMemory, workload: Workload, *, local_ranks: int = 1
) -> list[str]:
    """Return warnings if memory or disk may not be enough.

    Args:
        estimate: The estimate of the run.
        free: Free memory of one rank's device and of the host, and free disk.
        workload: The settings that the advice names.
        local_ranks: Ranks that share the host's memory.

    Raises:
        UserError: Weights and optimizer alone exceed the free memory, or the results exceed the
            free disk.
    """
    on_host = free.device is None
    room = free.host // local_ranks if free.device is None else free.device  # of one rank
    where = "this machine's memory" if on_host else "the GPU"
    certain = sum(estimate.device[part] for part in _CERTAIN)
    warnings = []
    if certain > room:
        raise UserError(
            f"model.name_or_path={workload.model_name}: weights and optimizer need "
            f"{certain / GIB:.1f} GiB per rank; {where} has {room / GIB:.1f} GiB free. "
            f"{_advice(estimate.device, workload)}"
        )
    if estimate.host * local_ranks > free.host:
        raise UserError(
            f"parallel.offload={workload.offload}: {local_ranks} ranks would keep "
            f"{estimate.host * local_ranks / GIB:.1f} GiB on the host, which has "
            f"{free.host / GIB:.1f} GiB free. Use more nodes, or a smaller "
            f"quant.nbits={workload.nbits}."
        )
    if sum(estimate.device.values()) > TIGHT * room:
        warnings.append(
            f"{where} may not be enough: {estimate}; free {room / GIB:.2f} GiB. "
            f"{_advice(estimate.device, workload)}"
        )
    return warnings + _check_disk(estimate, free, workload)


def oom_advice(workload: Workload, strategy: Strategy) -> str:
    """Return what to change after running out of memory: keys and values, most effective first."""
    advice, offload = [], workload.offload
    offloads_parameters = offload in ("parameters", "all")
    if workload.trains:
        if not workload.activation_checkpointing:
            advice.append("train.activation_checkpointing=true (now false)")
        elif offload not in ("activations", "all"):
            more = "all" if offloads_parameters else "activations"
            advice.append(f"parallel.offload={more} (now {offload})")
        if workload.micro_batch_size > 1:
            advice.append(
                f"a smaller train.micro_batch_size (now {workload.micro_batch_size}); the global "
                "batch and the result stay the same"
            )
        if workload.optimizer != "paged_adamw_8bit":
            advice.append(f"optim.name=paged_adamw_8bit (now {workload.optimizer})")
    if workload.has_reference:
        advice.append("eval.reference=off (now resident: the full-precision model is in memory)")
    advice.append(f"a smaller train.max_seq_len (now {workload.max_seq_len})")
    if workload.nbits > 1:
        advice.append(f"a smaller quant.nbits (now {workload.nbits})")
    if not strategy.shards_parameters:
        advice.append("several GPUs with parallel.strategy=fsdp2")
    if not offloads_parameters:
        advice.append("parallel.strategy=fsdp2 with parallel.offload=all")
    return "Out of memory. What helps, most effective first: " + "; ".join(advice) + "."


def _check_disk(estimate: MemoryEstimate, free: AvailableMemory, workload: Workload) -> list[str]:
    need = sum(estimate.disk.values())
    text = (
        f"run.root={workload.run_root}: the results need {need / GIB:.3f} GiB of disk; "
        f"{free.disk / GIB:.3f} GiB are free. Choose another run.root, or quant.save=false."
    )
    if need > free.disk:
        raise UserError(text)
    return [text] if need > TIGHT * free.disk else []


def _advice(parts: dict[str, int], workload: Workload) -> str:
    """Return the advice for the three largest parts."""
    largest = sorted((p for p in parts if parts[p]), key=lambda p: -parts[p])[:3]
    return "What helps: " + "; ".join(_HELP[p].format(w=workload) for p in largest) + "."


def available_memory(device: torch.device | str, folder: Path) -> AvailableMemory:
    """Return the free memory of `device` and host, and the free disk space for `folder`.

    `folder` need not exist yet.
    """
    device = torch.device(device)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    parents = (folder.absolute(), *folder.absolute().parents)
    existing = next(path for path in parents if path.exists())
    return AvailableMemory(free_host_memory(), disk_usage(existing).free, free)


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
