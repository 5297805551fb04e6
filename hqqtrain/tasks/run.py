"""The entry of a task: settings of the process that must precede the import of torch."""

import logging
import os

from hqqtrain.config.run import RunConfig

OPENMP_SPIN_COUNT = "10000"
"""Default of GOMP_SPINCOUNT, how long a waiting thread of GNU OpenMP spins.

By default the threads spin for milliseconds. If other processes use the same cores, this made
training 20 times slower (220 instead of 4,600 tokens/s, 2 cores). A short spin costs 5 % on an idle
machine and keeps a third of the speed next to a second run.
"""


def run_task(config: RunConfig, arguments: list[str]) -> int:
    """Run `config.task` to its end and return the exit code; see `run_selected_task`.

    Args:
        config: The resolved configuration.
        arguments: The words of the command line after `python -m hqqtrain`.
    """
    # OpenMP reads the variable when torch is imported, which `dispatch` does.
    os.environ.setdefault("GOMP_SPINCOUNT", OPENMP_SPIN_COUNT)
    # peft imports bitsandbytes, which warns on import that it fetched no kernels from the hub.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from hqqtrain.tasks.dispatch import run_selected_task

    return run_selected_task(config, arguments)
