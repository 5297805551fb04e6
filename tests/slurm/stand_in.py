"""A fake of hqqtrain's tasks, to test how a batch file reacts to the end of a run.

Python loads it as sitecustomize.py. `train.seed` chooses how the run ends:
1: preempted by a signal, and done after resuming.
2: a user error, before the run has a directory.
4: preempted every time, with nothing saved.
5: the same, before the run has a directory.
6: preempted three times, with a checkpoint at the first and the last time.
Any other seed: done.
"""

import json
import os
import signal
import sys
import time
import types
from pathlib import Path

from hqqtrain.rundir.directory import RunDirectory

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


def run_task(config, command):
    folder = Path(config.run.root) / config.run_name()
    seed, status = config.train.seed, folder / "status.json"
    if seed in (2, 5):
        return {2: 2, 5: 3}[seed]
    folder.mkdir(parents=True, exist_ok=True)
    if os.environ.get("RANK", "0") == "0":
        with RunDirectory(config) as run:
            run.begin(command)
    while not (folder / "config.yaml").exists():
        time.sleep(0.05)
    rank, starts = os.environ.get("RANK", "0"), folder / f"starts-{os.environ.get('RANK', '0')}"
    starts.open("a").write(f"{os.environ.get('SLURM_RESTART_COUNT', '0')}\n")
    if seed == 1 and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        signal.sigwait(SIGNALS)
        if rank == "0":
            (folder / "checkpoints" / "step-00000001").mkdir(parents=True)
            status.write_text(json.dumps({"status": "preempted", "exit_code": 3}, indent=2))
        # All ranks leave together.
        while not (status.exists() and "preempted" in status.read_text()):
            time.sleep(0.05)
        return 3
    count = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if seed == 4 or (seed == 6 and count < 3):
        status.write_text(json.dumps({"status": "preempted", "exit_code": 3}, indent=2))
        if seed == 6 and count != 1:
            (folder / "checkpoints" / f"step-{count:08}").mkdir(parents=True)
        return 3
    status.write_text(json.dumps({"status": "done", "exit_code": 0}, indent=2))
    return 0


if os.environ.get("SLURM_JOB_ID"):
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    tasks = types.ModuleType("hqqtrain.tasks.run")
    tasks.run_task = run_task
    sys.modules["hqqtrain.tasks"] = types.ModuleType("hqqtrain.tasks")
    sys.modules["hqqtrain.tasks.run"] = tasks
