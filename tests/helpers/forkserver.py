"""The process from which tests fork the ranks of a run, after it has imported what ranks need.

Python's multiprocessing has one fork server for each process, and its first user decides what it
imports. So all tests that start ranks use the context of this module.
"""

import functools
import multiprocessing
import os
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from unittest import mock

from hqqtrain.tasks.run import OPENMP_SPIN_COUNT


@functools.cache
def fork_context() -> ForkServerContext:
    """Return the context whose processes are forked from the server; the first one starts it."""
    os.environ.setdefault("GOMP_SPINCOUNT", OPENMP_SPIN_COUNT)  # as `run_task` does
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warm"])
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with mock.patch.dict(os.environ, PYTHONPATH=path):  # the server has no other way to find `warm`
        forkserver.ensure_running()
    return context
