"""Exit codes of `python -m hqqtrain` and `./launch.sh`, on which schedulers and sweeps rely."""

DONE, FAILED, USER_ERROR, PREEMPTED = 0, 1, 2, 3
"""PREEMPTED means that the run was asked to stop and has saved its state: run the same command
again to resume."""
