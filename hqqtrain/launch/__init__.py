"""Slurm: turns a command into a batch job, and the tasks of a job step into ranks of one run."""

from hqqtrain.launch.batch import Batch
from hqqtrain.launch.ranks import adopt_ranks
from hqqtrain.launch.refuse import check_same_launch
from hqqtrain.launch.submit import submit, submit_sweep

__all__ = ["Batch", "adopt_ranks", "check_same_launch", "submit", "submit_sweep"]
