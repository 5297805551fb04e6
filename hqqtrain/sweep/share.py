"""Partitions the machine among parallel jobs: its GPUs, or its CPU cores if it has no GPU."""

import os
import subprocess
from collections.abc import Mapping

from hqqtrain.config import UserError


def environments(at_a_time: int, environ: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the environment variables that give each parallel job its share of the machine.

    Args:
        at_a_time: how many jobs run in parallel.
        environ: the environment of the sweep. Variables that the user has set are kept.

    Returns:
        One dict per job, to be added to `environ`. A job that runs alone gets an empty dict.

    Raises:
        UserError: there are fewer GPUs than jobs, or the user's variables ask for more than the
            share of one job.
    """
    if at_a_time == 1:
        return [{}]
    _refuse_nodes(at_a_time, environ)
    gpus = visible_gpus(environ)
    shares = _gpu_shares(gpus, at_a_time, environ) if gpus else [{} for _ in range(at_a_time)]
    if "OMP_NUM_THREADS" not in environ:
        processes = int(environ.get("NPROC") or max(1, len(gpus) // at_a_time))
        threads = max(1, _count_cores() // (at_a_time * processes))
        shares = [share | {"OMP_NUM_THREADS": str(threads)} for share in shares]
    return shares


def visible_gpus(environ: Mapping[str, str]) -> list[str]:
    """Return the GPUs that this process may use, as names for CUDA_VISIBLE_DEVICES."""
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return [str(index) for index in range(_count_gpus())]
    names = [name.strip() for name in listed.split(",")]
    # A valid name is an index or begins with GPU- or MIG-; "-1" and "" mean no GPU.
    return [name for name in names if name[:1].isdigit() or name[:1] in ("G", "M")]


def _gpu_shares(
    gpus: list[str], at_a_time: int, environ: Mapping[str, str]
) -> list[dict[str, str]]:
    each = len(gpus) // at_a_time
    if each == 0:
        raise UserError(
            f"launch.jobs={at_a_time}: every job needs its own GPU, and {len(gpus)} are visible; "
            f"use launch.jobs={len(gpus)} or fewer."
        )
    if int(environ.get("NPROC") or 1) > each:
        raise UserError(
            f"NPROC={environ['NPROC']}: with launch.jobs={at_a_time} a job has {each} of "
            f"{len(gpus)} GPUs and runs one process per GPU; unset NPROC, or lower launch.jobs."
        )
    parts = [gpus[start : start + each] for start in range(0, each * at_a_time, each)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(part)} for part in parts]


def _refuse_nodes(at_a_time: int, environ: Mapping[str, str]) -> None:
    """Refuse parallel jobs on several nodes or with a fixed port.

    Nodes may start the jobs in a different order, so that ranks of different jobs would join one
    process group. Parallel jobs cannot share a port.
    """
    for name in ("NNODES", "MASTER_PORT"):
        if environ.get(name, "") not in ("", "0", "1"):
            raise UserError(
                f"launch.jobs={at_a_time}: with {name}={environ[name]} jobs cannot run in "
                f"parallel; use launch.jobs=1, or unset {name}."
            )


def _count_gpus() -> int:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def _count_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # respects taskset and the cpuset of a container
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
