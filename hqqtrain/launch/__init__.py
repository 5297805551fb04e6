"""Ways to start runs other than this process: sweeps on this machine, and jobs of slurm."""
