"""Runs the command line as a user would, in processes of its own, and reads what it left."""

import argparse
import contextlib
import functools
import inspect
import json
import logging
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

from hqqtrain.cli import main
from hqqtrain.common.signals import SIGNALS

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
TIMEOUT = 400

QUICK = (
    "recipe=tiny_2bit", "train.max_steps=4", "train.global_batch_size=4", "train.max_seq_len=64",
    "eval.tokens=1024", "track.backends=[]",
)  # fmt: skip
"""The default recipe, cut down to seconds."""


def small_data(folder: Path) -> tuple[str, ...]:
    """Words that train on one file and measure on another: the whole library takes seconds."""
    words = []
    for key, module in (("data", argparse), ("eval", typing)):
        file = folder / f"{key}.txt"
        file.write_text(inspect.getsource(module))
        words.append(f"{key}.source={file}")
    return tuple(words)


@dataclass(frozen=True)
class Finished:
    """`code`: the first that was not 0, of whatever rank; `codes`: each rank's own.

    -9 is one of a rank that was killed, as those are which do not end by themselves.
    """

    code: int
    output: str
    root: Path
    codes: tuple[int, ...]

    @property
    def directory(self) -> Path:
        """The run's directory; there must be exactly one."""
        (found,) = self.root.iterdir()
        return found

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.directory / "summary.json").read_text())

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(x) for x in (self.directory / "metrics.jsonl").read_text().splitlines()]

    def losses(self) -> list[float]:
        return [line["train/loss"] for line in self.metrics if "train/loss" in line]

    def norms(self) -> list[float]:
        return [line["train/grad_norm"] for line in self.metrics if "train/grad_norm" in line]


def run(*words: str, root: Path, processes: int = 1, per_node: int | None = None,
        meanwhile: Callable[[list[int]], None] = lambda pids: None,
        grace: float = 5, limit: float = TIMEOUT) -> Finished:  # fmt: skip
    """`python -m hqqtrain *words run.root=root`, or as many ranks of it as `processes` says.

    A rank is a process of its own, forked from one that has imported what every run imports:
    that takes 5 of the 6 seconds that a short run has. `meanwhile` is given their ids. Ranks are
    killed that go on for `grace` seconds after another has failed, or `limit` after `meanwhile`.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    outputs = [root.parent / f"output-{rank}.txt" for rank in range(processes)]
    port, workers = free_port(), []
    for rank, output in enumerate(outputs):
        output.write_text("")
        env = ENVIRONMENT | (_ranks(rank, processes, port, per_node) if processes > 1 else {})
        arguments = ([*words, f"run.root={root}"], root.parent, env, output)
        workers.append(_context().Process(target=_main, args=arguments))
        workers[-1].start()
    meanwhile([worker.pid for worker in workers])
    code = _join(workers, grace, limit)
    output = "".join(output.read_text() for output in outputs)
    return Finished(code, output, root, tuple(worker.exitcode for worker in workers))


def run_here(words: Sequence[str]) -> int:
    """The same in this process, where it can be patched; its exit code."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    logger = logging.getLogger("hqqtrain")
    handlers, level = logger.handlers, logger.level
    try:
        return main(list(words))
    finally:
        logger.handlers, logger.level = handlers, level
        for number, handler in before.items():
            signal.signal(number, handler)


def stand_in(package: Path, source: str) -> dict[str, str]:
    """An environment in which `source` is hqqtrain.tasks.run: no torch, no work."""
    package.mkdir()
    (package / "sitecustomize.py").write_text(
        "import sys, types\n"
        "tasks = types.ModuleType('hqqtrain.tasks.run')\n"
        f"exec({source!r}, tasks.__dict__)\n"
        "sys.modules['hqqtrain.tasks'] = types.ModuleType('hqqtrain.tasks')\n"
        "sys.modules['hqqtrain.tasks.run'] = tasks\n"
    )
    return {"PYTHONPATH": os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])}


def launch(*words: str, root: Path, launcher: Sequence[str] = (sys.executable,)) -> Finished:
    """The same by a real command line: `launcher -m hqqtrain *words run.root=root`."""
    root.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [*launcher, "-m", "hqqtrain", *words, f"run.root={root}"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT,
        cwd=root.parent, env={**os.environ, **ENVIRONMENT},
    )  # fmt: skip
    return Finished(done.returncode, done.stdout, root, (done.returncode,))


@functools.cache
def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hqqtrain.tasks.run"])
    return context


def _ranks(rank: int, size: int, port: int, per_node: int | None) -> dict[str, str]:
    """What torchrun tells its processes; of several nodes where they are told to be."""
    local = per_node or size
    numbers = {"RANK": rank, "LOCAL_RANK": rank % local}
    numbers |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": local}
    numbers |= {"MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in numbers.items()}}


def _main(words: list[str], folder: Path, env: dict[str, str], output: Path) -> None:
    """In the new process: what `python -m hqqtrain` does."""
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(folder)
    os.environ.update(env)
    torch.set_num_threads(1)
    sys.exit(main(words))


def _join(workers: list[Any], grace: float, limit: float) -> int:
    """The first exit code that is not 0, after which the others are ended, as launchers do."""
    left, deadline = list(workers), time.monotonic() + limit
    while left:
        connection.wait([w.sentinel for w in left], max(0, deadline - time.monotonic()))
        code = next((worker.exitcode for worker in left if worker.exitcode), 0)
        if code or time.monotonic() > deadline:
            _end(left, grace if code else 0)
            return code or 124
        left = [worker for worker in left if worker.exitcode is None]
    return 0


def _end(workers: list[Any], grace: float) -> None:
    deadline = time.monotonic() + grace
    for worker in workers:
        # a fault that all ranks know of ends them all
        worker.join(max(0.1, deadline - time.monotonic()))
        worker.kill()
        worker.join()


def free_port() -> int:
    """Below those that the system gives to connections, which are taken again at once."""
    while True:
        port = random.SystemRandom().randrange(16_000, 32_000)
        with socket.socket() as server, contextlib.suppress(OSError):
            server.bind(("127.0.0.1", port))
            return port
