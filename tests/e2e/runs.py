"""Runs the command line as a user would, in processes of its own, and reads what it left."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

QUICK = (
    "recipe=tiny_2bit", "train.max_steps=4", "train.global_batch_size=4", "train.max_seq_len=64",
    "eval.tokens=2048", "track.backends=[]",
)  # fmt: skip
"""The default recipe, cut down to seconds."""


@dataclass(frozen=True)
class Finished:
    code: int
    output: str
    root: Path

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


def run(*words: str, root: Path, processes: int = 1, launcher: list[str] | None = None,
        env: dict[str, str] | None = None) -> Finished:  # fmt: skip
    """`python -m hqqtrain *words run.root=root`, under torchrun for several processes."""
    root.parent.mkdir(parents=True, exist_ok=True)
    if launcher is None:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]
        several = [*torchrun, str(processes), "--master-port", str(free_port())]
        launcher = several if processes > 1 else [sys.executable]
    done = subprocess.run(
        [*launcher, "-m", "hqqtrain", *words, f"run.root={root}"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400, cwd=root.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", **(env or {})},
    )  # fmt: skip
    return Finished(done.returncode, done.stdout, root)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
