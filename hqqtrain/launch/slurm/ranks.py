"""Make the tasks of `srun python -m hqqtrain` the ranks of one run.

The rest of the program reads the variables that torchrun sets, such as RANK. Slurm sets variables
of its own. Of these, SLURM_STEP_NUM_TASKS is the number of processes: srun sets it in the tasks
that it starts (Slurm 22.05; in an interactive step it is 1). SLURM_NTASKS and SLURM_PROCID are not
usable: a batch script and the shell of salloc have them too, although each is a single process.
"""

import re
from collections.abc import Mapping, MutableMapping

_FIRST_PORT, _NUM_PORTS = 15_000, 14_000
"""The range lies below the ephemeral ports of Linux (from 32768) and below torchrun's 29500."""

_PORTS_PER_JOB = 10
"""Steps of one job may run at the same time, so each has a port of its own."""


def set_rank_env_from_slurm(environ: MutableMapping[str, str]) -> None:
    """Add torchrun's variables, such as RANK, to `environ` if srun has started several tasks.

    The environment stays as it is if srun has started torchrun or accelerate, because either has
    numbered the processes already.

    Args:
        environ: the environment of this process, changed in place.
    """
    has_several_tasks = int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    if not has_several_tasks or "RANK" in environ or "ACCELERATE_MIXED_PRECISION" in environ:
        return
    for name, value in _rendezvous(environ).items():
        environ.setdefault(name, value)  # a batch script may have set them
    node_tasks = tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])
    ranks = {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(node_tasks[int(environ["SLURM_NODEID"])]),
    }
    environ.update(ranks)


def first_host(hosts: str) -> str:
    """Return the first host of Slurm's host list: `gpu[03-05,9],login` -> `gpu03`."""
    first_group = re.split(r",(?![^[]*])", hosts)[0]  # at commas outside of brackets
    return re.sub(r"\[([^],-]+)[^]]*]", r"\1", first_group)  # [03-05,9] -> 03


def tasks_per_node(counts: str) -> list[int]:
    """Expand Slurm's short form to the number of tasks of every node: `4(x2),1` -> [4, 4, 1]."""
    tasks: list[int] = []
    for item in counts.split(","):
        count, _, repeats = item.partition("(x")
        tasks += [int(count)] * int(repeats.rstrip(")") or 1)
    return tasks


def _rendezvous(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the address where ranks meet: rank 0's host, and a port of this job and step."""
    step = int(environ["SLURM_STEP_ID"]) % _PORTS_PER_JOB
    offset = _PORTS_PER_JOB * int(environ["SLURM_JOB_ID"]) + step
    return {
        "MASTER_ADDR": first_host(environ["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(_FIRST_PORT + offset % _NUM_PORTS),
    }
