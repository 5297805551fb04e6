"""Shares the machine out among jobs that run at the same time: GPUs, or else cores."""

import os
import subprocess
from collections.abc import Mapping

from hqqtrain.common.errors import UserError


def partition_devices(at_a_time: int, environ: Mapping[str, str]) -> list[dict[str, str]]:
    """What each of `at_a_time` jobs gets beside the environment; nothing for one alone.

    Raises UserError where there are fewer GPUs than jobs, or the user's variables ask for more
    than a job's share.
    """
    if at_a_time == 1:
        return [{}]
    _refuse_nodes(at_a_time, environ)
    gpus = visible_gpus(environ)
    shares = _gpu_shares(gpus, at_a_time, environ) if gpus else [{} for _ in range(at_a_time)]
    if "OMP_NUM_THREADS" not in environ:
        processes = int(environ.get("NPROC") or max(1, len(gpus) // at_a_time))
        threads = max(1, _cores() // (at_a_time * processes))
        shares = [share | {"OMP_NUM_THREADS": str(threads)} for share in shares]
    return shares


def visible_gpus(environ: Mapping[str, str]) -> list[str]:
    """The names by which CUDA_VISIBLE_DEVICES knows the GPUs that this process may use."""
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return [str(number) for number in range(_gpus_of_the_machine())]
    names = [name.strip() for name in listed.split(",")]
    return [name for name in names if name[:1].isdigit() or name[:1] in ("G", "M")]


def _gpu_shares(
    gpus: list[str], at_a_time: int, environ: Mapping[str, str]
) -> list[dict[str, str]]:
    each = len(gpus) // at_a_time
    if each == 0:
        raise UserError(
            f"launch.max_parallel_jobs={at_a_time}: a job needs a GPU of its own, and {len(gpus)} can be seen; "
            f"at most {len(gpus)} run at a time."
        )
    if int(environ.get("NPROC") or 1) > each:
        raise UserError(
            f"NPROC={environ['NPROC']}: with launch.max_parallel_jobs={at_a_time} a job has {each} of "
            f"{len(gpus)} GPUs, a process each; unset NPROC, or run fewer jobs at a time."
        )
    parts = [gpus[start : start + each] for start in range(0, each * at_a_time, each)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(part)} for part in parts]


def _refuse_nodes(at_a_time: int, environ: Mapping[str, str]) -> None:
    """Nodes would meet in different jobs, and jobs on one port."""
    for name in ("NNODES", "MASTER_PORT"):
        if environ.get(name, "") not in ("", "0", "1"):
            raise UserError(
                f"launch.max_parallel_jobs={at_a_time}: with {name}={environ[name]} jobs run one at a time; "
                f"use launch.max_parallel_jobs=1, or unset {name}."
            )


def _gpus_of_the_machine() -> int:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # what taskset or a container leaves us
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
