"""Prepare the process for a task: some settings must be made before torch is imported."""

import logging
import os

from hqqtrain.config.run import RunConfig

OPENMP_SPIN_COUNT = "10000"
"""Our value of GOMP_SPINCOUNT, unless the user sets it: iterations that a waiting thread spins.

GNU OpenMP's own default lets waiting threads spin for milliseconds. On 2 cores that another process
used too, the default made training 20 times slower: 220 instead of 4,600 tokens/s. Our shorter spin
costs 5 % of the speed on an idle machine. Next to a second run, it keeps a third of the speed.
"""


def run_task(config: RunConfig, arguments: list[str]) -> int:
    """Run `config.task` to its end and return the exit code; see `dispatch_task`.

    Args:
        config: The resolved configuration.
        arguments: The command-line arguments after `python -m hqqtrain`.
    """
    # OpenMP reads GOMP_SPINCOUNT when torch is imported, which the import of `dispatch` does.
    os.environ.setdefault("GOMP_SPINCOUNT", OPENMP_SPIN_COUNT)
    # transformers reads this when it is imported. Where the package `kernels` is installed, it
    # would download and run code from the hub. A user who sets the variable has agreed to that.
    os.environ.setdefault("USE_HUB_KERNELS", "NO")
    # Hide a warning of bitsandbytes, which peft imports: that it fetched no kernels from the hub.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from hqqtrain.tasks.dispatch import dispatch_task

    return dispatch_task(config, arguments)
