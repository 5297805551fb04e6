"""Start runs in other processes: the jobs of a sweep on this machine, and jobs on Slurm."""
