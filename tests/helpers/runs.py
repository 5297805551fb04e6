"""Run the command line as a user would, in separate processes, and read the files it leaves."""

import argparse
import ast
import contextlib
import json
import logging
import os
import random
import re
import resource
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
from unittest import mock

import torch
from forkserver import fork_context
from small_model import small_model

from hqqtrain.cli import main
from hqqtrain.common.signals import SIGNALS

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
TIMEOUT = 400
"""Seconds until a command is killed."""
TIMEOUT_CODE = 124
"""Exit code of a command that was killed after the timeout, as `timeout` of coreutils returns."""

TEXT, HELD_OUT = argparse.__file__, typing.__file__
EVAL_TOKENS = 256
QUICK = (
    "recipe=tiny_2bit", "train.max_steps=4", "train.global_batch_size=4", "train.max_seq_len=64",
    f"eval.tokens={EVAL_TOKENS}", "eval.samples=0", "track.backends=[]", f"data.source={TEXT}",
    f"eval.source={HELD_OUT}", "quant.calibration=null",
)  # fmt: skip
"""The default recipe, reduced to a few seconds.

Two modules replace the standard library, which takes every rank 5 seconds to tokenize.
"""
SMALL = (*QUICK, f"model.name_or_path={small_model()}")
"""The same with a small random model."""


NO_REPORT = mock.patch("hqqtrain.tasks.finalize.write_report", return_value={})


def small_data(folder: Path) -> tuple[str, ...]:
    """Return arguments to train and evaluate on small files in `folder`, which a test may change.

    The training file has a text per function of a module, so that texts differ in length.
    """
    source = Path(TEXT).read_text()
    lines = source.splitlines()
    texts = [
        "\n".join(lines[node.lineno - 1 : node.end_lineno])
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
    ]
    data, held_out = folder / "data.jsonl", folder / "eval.txt"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    held_out.write_text(Path(HELD_OUT).read_text())
    return f"data.source={data}", f"eval.source={held_out}"


@dataclass(frozen=True)
class Finished:
    """The exit codes, the output and the files of a command that has ended."""

    code: int
    """The first exit code of any rank that is not 0; 0 if all ranks exited with 0."""
    output: str
    root: Path
    codes: tuple[int, ...]
    """Exit codes by rank. A rank that did not end by itself was killed and has -9."""

    @property
    def directory(self) -> Path:
        """Return the run directory; `root` must have exactly one."""
        (directory,) = self.root.iterdir()
        return directory

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.directory / "summary.json").read_text())

    @property
    def metrics(self) -> list[dict[str, Any]]:
        lines = (self.directory / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def losses(self) -> list[float]:
        return [row["train/loss"] for row in self.metrics if "train/loss" in row]

    def norms(self) -> list[float]:
        return [row["train/grad_norm"] for row in self.metrics if "train/grad_norm" in row]


def run(
    *words: str,
    root: Path,
    processes: int = 1,
    per_node: int | None = None,
    meanwhile: Callable[[list[int]], None] = lambda pids: None,
    grace: float = 5,
    limit: float = TIMEOUT,
    max_gib: float | None = None,
    before: Callable[[], object] | None = None,
) -> Finished:
    """Run `python -m hqqtrain *words run.root=root`, on one or several ranks.

    Each rank is a process that is forked from a server. The server has imported the modules of
    every run, because imports take 5 of the 6 seconds of a short run.

    No report is written, which would take 2 more. A run that `launch` starts has a report.

    Args:
        words: Arguments of the command line.
        root: `run.root`; its parent gets the output of every rank.
        processes: Number of ranks.
        per_node: Ranks per node, if several nodes are to be simulated.
        meanwhile: Called with the process ids of the ranks once all have started.
        grace: Seconds after the failure of one rank until the others are killed.
        limit: Seconds after the return of `meanwhile` until all ranks are killed.
        max_gib: Memory that each rank may use in addition to that of the imported modules.
        before: Function of a module that each rank calls first, to patch what it runs.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    outputs = [root.parent / f"output-{rank}.txt" for rank in range(processes)]
    port, workers = free_port(), []
    for rank, output in enumerate(outputs):
        env = _rank_environment(rank, processes, port, per_node) if processes > 1 else {}
        arguments = [*words, f"run.root={root}"]
        workers.append(_fork(arguments, root.parent, output, env, max_gib, before))
    meanwhile([worker.pid for worker in workers])
    code = _join(workers, grace, limit)
    output = "".join(output.read_text() for output in outputs)
    return Finished(code, output, root, tuple(worker.exitcode for worker in workers))


def run_in(folder: Path, *words: str) -> Finished:
    """Run `python -m hqqtrain *words` with a working directory, as `run` does."""
    output = folder / "output.txt"
    worker = _fork(list(words), folder, output)
    return Finished(_join([worker], 0, TIMEOUT), output.read_text(), folder, (worker.exitcode,))


def run_in_this_process(words: Sequence[str]) -> int:
    """Run the command line in this process, where tests can patch it; return the exit code.

    The run has no report, as with `run`.
    """
    signal_handlers = {number: signal.getsignal(number) for number in SIGNALS}
    logger = logging.getLogger("hqqtrain")
    handlers, level = logger.handlers, logger.level
    try:
        with NO_REPORT:
            return main(list(words))
    finally:
        logger.handlers, logger.level = handlers, level
        for number, handler in signal_handlers.items():
            signal.signal(number, handler)


def fake_task_module(package: Path, source: str) -> dict[str, str]:
    """Return an environment in which `source` replaces hqqtrain.tasks.run, which imports torch."""
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
    """Run `launcher -m hqqtrain *words run.root=root` as a real command line."""
    root.parent.mkdir(parents=True, exist_ok=True)
    completed = subprocess.run(
        [*launcher, "-m", "hqqtrain", *words, f"run.root={root}"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT,
        cwd=root.parent, env={**os.environ, **ENVIRONMENT},
    )  # fmt: skip
    code = completed.returncode
    return Finished(code, completed.stdout, root, (code,))


def _rank_environment(rank: int, size: int, port: int, per_node: int | None) -> dict[str, str]:
    """Return the environment variables that torchrun sets, on one node or on several."""
    local_size = per_node or size
    numbers = {"RANK": rank, "LOCAL_RANK": rank % local_size}
    numbers |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": local_size}
    numbers |= {"MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in numbers.items()}}


def _fork(
    words: list[str], folder: Path, output: Path, env: dict[str, str] | None = None,
    max_gib: float | None = None, before: Callable[[], object] | None = None,
) -> Any:  # fmt: skip
    """Start a process that does the same as `python -m hqqtrain *words` in `folder`."""
    output.write_text("")
    arguments = (words, folder, ENVIRONMENT | (env or {}), output, max_gib, before)
    worker = fork_context().Process(target=_main, args=arguments)
    worker.start()
    return worker


def _main(
    words: list[str], folder: Path, env: dict[str, str], output: Path, max_gib: float | None,
    before: Callable[[], object] | None,
) -> None:  # fmt: skip
    """Do the same as `python -m hqqtrain`, in the new process of a rank."""
    if max_gib is not None:
        (now,) = re.findall(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())
        limit = (int(now) << 10) + int(max_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(folder)
    os.environ.update(env)
    torch.set_num_threads(1)
    if before:
        before()
    with NO_REPORT:
        sys.exit(main(words))


def _join(workers: list[Any], grace: float, limit: float) -> int:
    """Return the first exit code that is not 0 and end the other ranks, as launchers do."""
    running, deadline = list(workers), time.monotonic() + limit
    while running:
        connection.wait([w.sentinel for w in running], max(0, deadline - time.monotonic()))
        code = next((worker.exitcode for worker in running if worker.exitcode), 0)
        if code or time.monotonic() > deadline:
            _end(running, grace if code else 0)
            return code or TIMEOUT_CODE
        running = [worker for worker in running if worker.exitcode is None]
    return 0


def _end(workers: list[Any], grace: float) -> None:
    deadline = time.monotonic() + grace
    for worker in workers:
        # If all ranks have the same error, they end by themselves within the grace period.
        worker.join(max(0.1, deadline - time.monotonic()))
        worker.kill()
        worker.join()


def free_port() -> int:
    """Return a free port below the range from which the system takes ports of connections."""
    while True:
        port = random.SystemRandom().randrange(16_000, 32_000)
        with socket.socket() as server, contextlib.suppress(OSError):
            server.bind(("127.0.0.1", port))
            return port
