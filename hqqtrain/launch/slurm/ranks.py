"""`srun python -m hqqtrain`: the tasks of a slurm step are the ranks of one run.

The rest of the program asks for RANK and its like, as torchrun sets them; slurm has names of its
own. SLURM_NTASKS and SLURM_PROCID will not do: a batch script and the shell of salloc have them
too, and are one process. SLURM_STEP_NUM_TASKS is set by srun, in what it starts
(slurm 22.05; in an interactive step it is 1).
"""

import re
from collections.abc import Mapping, MutableMapping

_FIRST_PORT, _PORTS = 15_000, 14_000
"""Below those that systems hand out themselves (from 32768), and below torchrun's 29500."""

_PORTS_PER_JOB = 10


def set_rank_env_from_slurm(environ: MutableMapping[str, str]) -> None:
    """Adds RANK, WORLD_SIZE, ... to `environ`, in a step of several tasks that srun started.

    Changes nothing where torchrun or accelerate, started by srun, have numbered the processes.
    """
    several = int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    if not several or "RANK" in environ or "ACCELERATE_MIXED_PRECISION" in environ:
        return
    for name, value in _master(environ).items():
        environ.setdefault(name, value)  # a batch script may have chosen them
    ranks = {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(_tasks_of_this_node(environ)),
    }
    environ.update(ranks)


def first_host(hosts: str) -> str:
    """The first of slurm's list of hosts: `gpu[03-05,9],login` -> `gpu03`."""
    first = re.split(r",(?![^[]*])", hosts)[0]
    return re.sub(r"\[([^],-]+)[^]]*]", r"\1", first)


def tasks_per_node(counts: str) -> list[int]:
    """Slurm's short form, node by node: `4(x2),1` -> [4, 4, 1]."""
    tasks: list[int] = []
    for part in counts.split(","):
        number, _, times = part.partition("(x")
        tasks += [int(number)] * int(times.rstrip(")") or 1)
    return tasks


def _master(environ: Mapping[str, str]) -> dict[str, str]:
    """Where ranks meet: rank 0's host, and a port that no other job or step on it has."""
    step = int(environ["SLURM_STEP_ID"]) % _PORTS_PER_JOB
    chosen = _PORTS_PER_JOB * int(environ["SLURM_JOB_ID"]) + step
    return {
        "MASTER_ADDR": first_host(environ["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(_FIRST_PORT + chosen % _PORTS),
    }


def _tasks_of_this_node(environ: Mapping[str, str]) -> int:
    return tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])[int(environ["SLURM_NODEID"])]
