"""Slurm: batch files, array jobs, requeueing, and the ranks that `srun` starts."""
