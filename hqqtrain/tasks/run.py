"""Prepare the process for a task: some settings must be made before torch is imported."""

import contextlib
import gc
import logging
import os
import sys
from collections.abc import Iterator

from hqqtrain.config.run import RunConfig
from hqqtrain.distributed.accelerate_env import relaunch_if_ranks_were_lost

_TRUE = ("1", "ON", "YES", "TRUE")
"""Values of USE_HUB_KERNELS that transformers takes for consent, in any case."""

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
    relaunch_if_ranks_were_lost(arguments)  # before the imports, which every rank repeats
    _prepare_imports()
    with _no_garbage_collection():
        from hqqtrain.tasks.dispatch import dispatch_task

    return dispatch_task(config, arguments)


def check_inputs(config: RunConfig) -> list[str]:
    """Check the local inputs of `config`; see `hqqtrain.tasks.check`."""
    _prepare_imports()
    with _no_garbage_collection():
        from hqqtrain.tasks import check

    return check.check_inputs(config)


def _prepare_imports() -> None:
    """Make the settings that torch, transformers and bitsandbytes read when they are imported."""
    # OpenMP reads GOMP_SPINCOUNT when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", OPENMP_SPIN_COUNT)
    # Where Hugging Face's package `kernels` is installed, transformers and bitsandbytes, which peft
    # imports, would download code from the hub and run it. A user who sets USE_HUB_KERNELS has
    # agreed to that. bitsandbytes ignores the variable, so the package is hidden from it. In a
    # clone of this repository, this also hides the folder kernels/, which Python would take for
    # that package.
    if os.environ.setdefault("USE_HUB_KERNELS", "NO").upper() in _TRUE:
        return
    sys.modules["kernels"] = None  # type: ignore[assignment]
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_not_about_hub_kernels)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Import torch, transformers and the rest without passes of the garbage collector.

    They took 0.7 of 5.4 s. Imported objects stay to the end, so later passes skip them, too: each
    full one took 0.5 s longer.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _is_not_about_hub_kernels(record: logging.LogRecord) -> bool:
    """Whether bitsandbytes says anything but that it found no package `kernels`."""
    return "kernels-community" not in record.getMessage()
