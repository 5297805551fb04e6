"""Compare the estimate of a run with the memory and disk that are free.

A run that cannot fit raises an error, and a run that may not fit a warning. Both messages name the
keys that reduce the need.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage

import psutil
import torch

from hqqtrain.common.errors import UserError
from hqqtrain.distributed.strategies.base import Strategy
from hqqtrain.loading.memory_estimate import GIB, MemoryEstimate
from hqqtrain.loading.workload import Workload

_CGROUP_ROOT = Path("/sys/fs/cgroup")

WARNING_FRACTION = 0.9
"""Fraction of the free bytes above which a run gets a warning, because estimates are inexact."""

_EXACT_PURPOSES = ("packed weights", "dense weights", "adapter and optimizer", "reference model")
"""Purposes of memory in the estimate whose sizes are exact."""

_ADVICE_BY_PURPOSE = {
    "packed weights": "lower quant.nbits={w.nbits}, or more GPUs with parallel.strategy=fsdp2",
    "dense weights": "more GPUs with parallel.strategy=fsdp2, or {fewer_dense}",
    "reference model": "eval.reference={w.smaller_reference}",
    "adapter and optimizer": "optim.name=paged_adamw_8bit, "
    "adapter.dtype=bf16 or a smaller adapter.r={w.adapter_rank}",
    "activations": "a smaller train.micro_batch_size={w.micro_batch_size} or "
    "train.max_seq_len={w.max_seq_len}, and train.activation_checkpointing=offload",
    "logits": "a smaller train.micro_batch_size={w.micro_batch_size} or "
    "train.max_seq_len={w.max_seq_len}",
    "working memory": "more GPUs with parallel.strategy=fsdp2",
    "outputs of the reference model": "a smaller eval.tokens={w.eval_tokens}, or "
    "eval.reference=off",
}
"""Advice by purpose of memory; `w` is the workload, `fewer_dense` quantizes more layers."""


@dataclass(frozen=True)
class AvailableMemory:
    """Free bytes.

    Attributes:
        host: Free memory of the host.
        disk: Free space for the run's directory.
        device: Free memory of the GPU; None if the model is in the host's memory.
    """

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
    free_per_rank = free.host // local_ranks if free.device is None else free.device
    where = "this machine's memory" if on_host else "the GPU"
    exact = sum(estimate.device[purpose] for purpose in _EXACT_PURPOSES)
    warnings = []
    if exact > free_per_rank:
        raise UserError(
            f"model.name_or_path={workload.model_name}: weights and optimizer need "
            f"{exact / GIB:.1f} GiB per rank; {where} has {free_per_rank / GIB:.1f} GiB free. "
            f"{_advice(estimate.device, workload)}"
        )
    if estimate.host * local_ranks > free.host:
        no_reference = " or eval.reference=off" if workload.reference != "off" else ""
        is_meta = workload.offloads_meta and workload.offload == "none"
        key = "quant.offload_meta=true" if is_meta else f"parallel.offload={workload.offload}"
        raise UserError(
            f"{key}: {local_ranks} ranks would keep "
            f"{estimate.host * local_ranks / GIB:.1f} GiB on the host, which has "
            f"{free.host / GIB:.1f} GiB free. Use more nodes, or "
            f"{_fewer_bits(workload)}{no_reference}."
        )
    if estimate.calibration > free_per_rank:
        raise UserError(
            f"quant.calibration: needs about {estimate.calibration / GIB:.1f} GiB per rank while "
            f"the model is quantized; {where} has {free_per_rank / GIB:.1f} GiB free. Set "
            "quant.calibration=null, which needs little memory and has a higher error, or a "
            f"smaller quant.calibration_tokens={workload.calibration_tokens}."
        )
    if sum(estimate.device.values()) > WARNING_FRACTION * free_per_rank:
        warnings.append(
            f"{where} may not be enough: {estimate}; free {free_per_rank / GIB:.2f} GiB. "
            f"{_advice(estimate.device, workload)}"
        )
    return warnings + _check_disk(estimate, free, workload)


def oom_advice(workload: Workload, strategy: Strategy) -> str:
    """Return what to change after running out of memory: keys and values, most effective first."""
    advice = list(_training_advice(workload)) if workload.trains else []
    if workload.calibration_tokens:
        advice.append(
            "if the model was being quantized, quant.calibration=null or a smaller "
            f"quant.calibration_tokens (now {workload.calibration_tokens})"
        )
    if workload.reference != "off":
        is_whole = workload.reference == "resident"
        advice.append(
            f"eval.reference={workload.smaller_reference} (now {workload.reference}, which keeps "
            f"{'the full-precision model' if is_whole else 'its embeddings and head'} in memory)"
        )
    advice.append(
        "shorter prompts, or a smaller generate.max_new_tokens"
        if workload.task == "generate"
        else f"a smaller train.max_seq_len (now {workload.max_seq_len})"
    )
    if workload.nbits is None or workload.nbits > 1:
        advice.append(_fewer_bits(workload))
    if not strategy.shards_parameters:
        advice.append("several GPUs with parallel.strategy=fsdp2")
    if workload.offload != "parameters":
        if not (strategy.shards_parameters or workload.offloads_meta or workload.nbits is None):
            advice.append("quant.offload_meta=true")
        advice.append(
            "parallel.strategy=fsdp2 with parallel.offload=parameters"
            if workload.trains
            else "parallel.offload=parameters, in one process or with fsdp2"
        )
    return "Out of memory. What helps, most effective first: " + "; ".join(advice) + "."


def _training_advice(workload: Workload) -> Iterator[str]:
    """Yield what to change if the model was being trained."""
    mode = workload.activation_checkpointing
    if mode != "offload":
        less = "offload" if mode == "full" else "full or offload"
        yield f"train.activation_checkpointing={less} (now {mode})"
    if workload.micro_batch_size > 1:
        yield (
            f"a smaller train.micro_batch_size (now {workload.micro_batch_size}); the global "
            "batch and the result stay the same"
        )
    if workload.optimizer != "paged_adamw_8bit":
        yield f"optim.name=paged_adamw_8bit (now {workload.optimizer})"


def _check_disk(estimate: MemoryEstimate, free: AvailableMemory, workload: Workload) -> list[str]:
    """Return a warning if the disk may be too small, and raise a UserError if it is."""
    needed = sum(estimate.disk.values())
    smaller = ", or quant.save=false" if workload.saves_quantized else ""
    message = (
        f"run.root={workload.run_root}: the results need {needed / GIB:.3f} GiB of disk; "
        f"{free.disk / GIB:.3f} GiB are free. Choose another run.root{smaller}."
    )
    if needed > free.disk:
        raise UserError(message)
    return [message] if needed > WARNING_FRACTION * free.disk else []


def _advice(device: dict[str, int], workload: Workload) -> str:
    """Return the advice for the three purposes with the most bytes on the device."""
    largest = sorted((p for p in device if device[p]), key=lambda p: -device[p])[:3]
    fewer_dense = _fewer_bits(workload) if workload.nbits is None else "a shorter quant.skip"
    advice = [_ADVICE_BY_PURPOSE[p].format(w=workload, fewer_dense=fewer_dense) for p in largest]
    return f"What helps: {'; '.join(advice)}."


def _fewer_bits(workload: Workload) -> str:
    if workload.nbits is None:
        return "quant.nbits=8 or less (now null: nothing is quantized)"
    return f"a smaller quant.nbits (now {workload.nbits})"


def available_memory(device: torch.device | str, folder: Path) -> AvailableMemory:
    """Return the free memory of `device` and host, and the free disk space for `folder`.

    `folder` need not exist yet.
    """
    device = torch.device(device)
    free_device = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    ancestors = (folder.absolute(), *folder.absolute().parents)
    existing = next(path for path in ancestors if path.exists())
    return AvailableMemory(free_host_memory(), disk_usage(existing).free, free_device)


def free_host_memory() -> int:
    """Return the bytes that can be allocated without swapping, within the limits of cgroups.

    psutil reports the whole machine, but slurm and containers grant only a part of it.
    """
    return min([psutil.virtual_memory().available, *_read_cgroup_limits()])


def _read_cgroup_limits() -> list[int]:
    """Read the memory limits of this process's cgroup (version 2) and of its parents, in bytes."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    own_group = next((line[3:] for line in lines if line.startswith("0::")), "/")
    folder = _CGROUP_ROOT / own_group.strip("/")
    groups = [folder, *(p for p in folder.parents if p.is_relative_to(_CGROUP_ROOT))]
    limits = (_read_limit(group / "memory.max") for group in groups)
    return [limit for limit in limits if limit is not None]


def _read_limit(path: Path) -> int | None:
    """Read the limit in a memory.max file; None if it says "max" or cannot be read."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
