"""Exit codes of `python -m hqqtrain` and `./launch.sh`: what schedulers and sweeps act upon."""

DONE, FAILED, USER_ERROR, PREEMPTED = 0, 1, 2, 3
"""PREEMPTED: it was asked to stop and has saved; the same command goes on."""
