"""Variables by which a launcher numbers the processes of a run, each read in one place.

torchrun and `accelerate launch` set them. For the tasks of srun, `hqqtrain.launch.slurm.ranks` sets
the same variables.
"""

import os


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
