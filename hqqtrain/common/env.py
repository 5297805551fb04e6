"""Variables by which a launcher numbers the processes of a run, each read in one place.

torchrun and `accelerate launch` set them. For the tasks of srun, `hqqtrain.launch.slurm.ranks` sets
the same variables.
"""

import os

from hqqtrain.common.errors import UserError

_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def check_rank_variables() -> None:
    """Check the numbers of this process, which an earlier command may have left in the shell.

    Raises:
        UserError: A variable is no number, or the rank is not below the number of processes.
    """
    for name in _NUMBERS:
        value = os.environ.get(name, "0")
        if not (value.isascii() and value.isdigit()):
            raise _rank_error(f"{name}={value}: must be a number")
    rank, size = get_rank(), get_world_size()
    if "WORLD_SIZE" in os.environ and rank >= size:
        raise _rank_error(f"RANK={rank}: must be below WORLD_SIZE={size}")


def check_master_address() -> None:
    """Check that several processes know where to meet.

    Raises:
        UserError: MASTER_ADDR is not set.
    """
    if get_world_size() > 1 and not os.environ.get("MASTER_ADDR"):
        raise _rank_error(f"WORLD_SIZE={get_world_size()}: needs MASTER_ADDR, where they meet")


def _rank_error(fault: str) -> UserError:
    error = UserError(
        f"{fault}. Launchers such as torchrun set these variables; to run one process, enter: "
        f"unset {' '.join(_NUMBERS)}"
    )
    error.is_of_one_rank = True
    return error


def get_rank() -> int:
    """Return the rank of this process; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def get_world_size() -> int:
    """Return the number of processes of the run; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def get_local_world_size() -> int:
    """Return the number of processes on this machine; 0 if no launcher has set it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "0"))


def get_slurm_job_id() -> str | None:
    """Return the id by which squeue and scontrol know this job; None outside of Slurm.

    A task of an array is ARRAY_TASK: the SLURM_JOB_ID of its last task is the id of the whole
    array, so requeueing that id would requeue every task.
    """
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")
