"""A fake of hqqtrain's tasks, to test how a batch file reacts to the end of a run.

Python loads it as sitecustomize.py. `train.seed` chooses how the run ends:
1: preempted by a signal, and done after resuming.
2: a user error, before the run has a directory.
4: preempted every time, with nothing saved.
5: the same, before the run has a directory.
6: preempted three times, with a checkpoint at the first and the last time.
Any other seed: done.

As in a real run, only rank 0 writes into the run directory, and it holds the lock until its end.
The other ranks may be ahead of it: they must not write a file that it reads.
"""

import os
import signal
import sys
import time
import types

from hqqtrain.rundir.directory import RunDirectory

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
EXIT_CODES_WITHOUT_DIRECTORY = {2: 2, 5: 3}
"""`train.seed` -> exit code."""


def run_task(config, command):
    seed, restarts = config.train.seed, int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if seed in EXIT_CODES_WITHOUT_DIRECTORY:
        return EXIT_CODES_WITHOUT_DIRECTORY[seed]
    waits_for_signal = seed == 1 and restarts == 0
    is_preempted = waits_for_signal or seed == 4 or (seed == 6 and restarts < 3)
    if os.environ.get("RANK", "0") == "0":
        with RunDirectory(config) as run:
            run.begin(command)
            record_start(run.path, restarts)
            if waits_for_signal:
                signal.sigwait(SIGNALS)
            if waits_for_signal or (seed == 6 and restarts in (0, 2)):
                (run.layout.checkpoints / f"step-{restarts + 1:08}").mkdir(parents=True)
            status, code = ("preempted", 3) if is_preempted else ("done", 0)
            run.write_status(status, exit_code=code)
        return code
    run = RunDirectory(config)
    wait_until(run.layout.config_yaml.exists)
    record_start(run.path, restarts)
    if waits_for_signal:
        signal.sigwait(SIGNALS)
        wait_until(lambda: run.read_status().status == "preempted")  # all ranks leave together
    return 3 if is_preempted else 0


def record_start(folder, restarts):
    with (folder / f"starts-{os.environ.get('RANK', '0')}").open("a") as file:
        file.write(f"{restarts}\n")


def wait_until(condition):
    while not condition():
        time.sleep(0.05)


if os.environ.get("SLURM_JOB_ID"):
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    tasks = types.ModuleType("hqqtrain.tasks.run")
    tasks.run_task = run_task
    sys.modules["hqqtrain.tasks"] = types.ModuleType("hqqtrain.tasks")
    sys.modules["hqqtrain.tasks.run"] = tasks
