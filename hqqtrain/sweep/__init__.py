"""Sweeps: run many configurations from one command, resume them, and compare them in one table."""

from hqqtrain.sweep.job import Job
from hqqtrain.sweep.run import run_all, show_table
from hqqtrain.sweep.sweep import Sweep

__all__ = ["Job", "Sweep", "run_all", "show_table"]
