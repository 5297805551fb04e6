"""Settings of all tests: Triton kernels run in the interpreter on a machine without a GPU."""

import gc
import logging
import os
import signal
from collections.abc import Iterator
from functools import cache
from importlib import util
from pathlib import Path

import pytest
import torch

from hqqtrain.common import signals

gc.disable()  # until all tests are collected, see `pytest_runtestloop`

# Tests compare with results in fp32, whatever the CPU; see `hqqtrain.distributed.precision`.
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE"

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Triton reads this when its functions are decorated, so it is set before the first import.
    os.environ["TRITON_INTERPRET"] = "1"
    if util.find_spec("triton"):
        import fast_interpreter

        fast_interpreter.speed_up()

pytest_plugins = ["random_models", "quantized_models", "exports", "tiny_runs", "hub_server"]

collect_ignore = [] if "HQQTRAIN_INTEROP" in os.environ else ["interop"]
"""The tests in interop/ need environments that are made by hand."""

MARKED_FOLDERS = ("e2e", "slurm", "interop")
LONG_FIRST = (
    "slurm/", "e2e/test_readme.py", "e2e/test_resume.py", "kernels/test_compiled.py",
    "e2e/test_run.py", "e2e/test_ranks.py", "e2e/test_nonfinite.py", "loading/test_load.py",
    "kernels/test_quantize_triton.py", "e2e/test_sweep.py", "e2e/test_stop.py", "e2e/",
    "tracking/test_wandb", "quant/test_quantize.py", "tasks/test_finetune.py",
    "integrations/test_transformers.py", "distributed/", "kernels/", "tasks/", "compose/",
)  # fmt: skip
"""Beginnings of paths, the longest files first.

A process runs whole files, so a long file must not be among the last. The tests of slurm/ and of
the tracker for W&B mostly wait, so they leave the cores to the files that run beside them.
"""


def pytest_configure() -> None:
    """Restore signals that a shell makes background processes ignore.

    Child processes inherit ignored signals, so the tests that send signals would hang.
    """
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    for number, default in defaults.items():
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, default)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by folder before `-m` selects, skip what needs a GPU, and put long files first."""
    for item in items:
        folder = _path(item.path).partition("/")[0]
        if folder in MARKED_FOLDERS:
            item.add_marker(folder)
        if not HAS_GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
    items.sort(key=lambda item: _place(item.path))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Let garbage collection pass over neither modules nor tests.

    It took 5 % of the time of the tests, and a quarter of that of their collection.
    """
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True, scope="session")
def _cache_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what runs cache for this user in a folder that all processes of the session share."""
    base = tmp_path_factory.getbasetemp()
    folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    os.environ["HQQTRAIN_CACHE"] = str(folder / "hqqtrain-cache")
    yield
    del os.environ["HQQTRAIN_CACHE"]


@pytest.fixture(autouse=True)
def _forget_signals() -> Iterator[None]:
    """Let no test see the signal of an earlier one, which all code of this process would obey.

    The wakeup descriptor records the signals of every later test as well, so it is removed, too.
    """
    signals._FirstSignal.name = ""
    yield
    signal.set_wakeup_fd(-1)


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    """Restore the level and the handlers of our logger, which `setup_logging` changes."""
    logger = logging.getLogger("hqqtrain")
    level, handlers = logger.level, logger.handlers
    yield
    logger.handlers = handlers
    logger.setLevel(level)


@cache
def _path(file: Path) -> str:
    return file.relative_to(Path(__file__).parent).as_posix()


@cache
def _place(file: Path) -> int:
    """Return the index of the first entry of LONG_FIRST that matches; other files come last."""
    matches = (i for i, start in enumerate(LONG_FIRST) if _path(file).startswith(start))
    return next(matches, len(LONG_FIRST))
