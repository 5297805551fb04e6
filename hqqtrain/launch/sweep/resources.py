"""Partition the machine among parallel jobs: its GPUs and its CPU cores."""

import os
import subprocess
from collections.abc import Mapping

from hqqtrain.common.errors import UserError


def partition_devices(num_jobs: int, environ: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the environment variables that give each parallel job its share of the machine.

    Args:
        num_jobs: how many jobs run in parallel.
        environ: the environment of the sweep. Variables that the user has set are kept.

    Returns:
        One dict per job, to be added to `environ`. A job that runs alone gets an empty dict.

    Raises:
        UserError: there are fewer GPUs than jobs, or the user's variables ask for more than the
            share of one job.
    """
    if num_jobs == 1:
        return [{}]
    _refuse_nodes(num_jobs, environ)
    gpus = visible_gpus(environ)
    shares = _gpu_shares(gpus, num_jobs, environ) if gpus else [{} for _ in range(num_jobs)]
    if "OMP_NUM_THREADS" not in environ:
        processes_per_job = int(environ.get("NPROC") or max(1, len(gpus) // num_jobs))
        threads = max(1, _count_cores() // (num_jobs * processes_per_job))
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


def _gpu_shares(gpus: list[str], num_jobs: int, environ: Mapping[str, str]) -> list[dict[str, str]]:
    """Return CUDA_VISIBLE_DEVICES for each job. All jobs get equally many GPUs.

    Raises:
        UserError: there are fewer GPUs than jobs, or NPROC exceeds the GPUs of one job.
    """
    gpus_per_job = len(gpus) // num_jobs
    if gpus_per_job == 0:
        raise UserError(
            f"launch.max_parallel_jobs={num_jobs}: every job needs its own GPU, and {len(gpus)} "
            f"are visible; use launch.max_parallel_jobs={len(gpus)} or fewer."
        )
    if int(environ.get("NPROC") or 1) > gpus_per_job:
        raise UserError(
            f"NPROC={environ['NPROC']}: with launch.max_parallel_jobs={num_jobs} a job has "
            f"{gpus_per_job} of {len(gpus)} GPUs and runs one process per GPU; unset NPROC, or "
            "lower launch.max_parallel_jobs."
        )
    return [
        {"CUDA_VISIBLE_DEVICES": ",".join(gpus[job * gpus_per_job : (job + 1) * gpus_per_job])}
        for job in range(num_jobs)
    ]


def _refuse_nodes(num_jobs: int, environ: Mapping[str, str]) -> None:
    """Refuse parallel jobs on several nodes or with a fixed port.

    Nodes may start the jobs in a different order, so that ranks of different jobs would join one
    process group. Parallel jobs cannot share a port.
    """
    for name in ("NNODES", "MASTER_PORT"):
        if environ.get(name, "") not in ("", "0", "1"):
            raise UserError(
                f"launch.max_parallel_jobs={num_jobs}: with {name}={environ[name]} jobs cannot "
                f"run in parallel; use launch.max_parallel_jobs=1, or unset {name}."
            )


def _count_gpus() -> int:
    """Return the number of GPUs that nvidia-smi lists; 0 if it is not installed or hangs."""
    try:
        result = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in result.stdout.splitlines())


def _count_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # respects taskset and the cpuset of a container
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
