"""Runs the jobs of a sweep one after another, each as a process of its own.

A process of its own, because a job that fails, runs out of memory or leaves a process group
behind must not touch the next one. One failure does not end the sweep; a preemption does.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hqqtrain.config import RunConfig

LAUNCHER = "HQQTRAIN_LAUNCHER"
"""Set by launch.sh to itself, so that each job gets all the GPUs."""

DONE, FAILED, PREEMPTED = 0, 1, 3


@dataclass(frozen=True)
class Job:
    """One combination: the words of its command line and the configuration they stand for."""

    words: list[str]
    config: RunConfig

    @property
    def folder(self) -> Path:
        """The run directory, which two jobs share only if they mean the same."""
        return Path(self.config.run.root) / self.config.run_name()


def run_all(jobs: list[Job]) -> int:
    """Runs every job; 0 if all are done, 3 if one was preempted, else 1 and the failed named."""
    failed = []
    for number, job in enumerate(jobs, 1):
        title = f"sweep {number}/{len(jobs)}: {shlex.join(job.words)}"
        print(title, flush=True)
        began = time.monotonic()
        code = _run(job)
        print(f"{title}: {_result(job, code)} ({time.monotonic() - began:.0f} s)", flush=True)
        if code == PREEMPTED:
            return PREEMPTED
        if code != DONE:
            failed.append(job)
    for job in failed:
        print(f"hqqtrain: failed: {shlex.join(job.words)}; see {job.folder}", file=sys.stderr)
    return FAILED if failed else DONE


def _run(job: Job) -> int:
    """The job's exit code. A signal to us is one to the job, which we wait for."""
    launcher = os.environ.get(LAUNCHER)
    command = [launcher] if launcher else [sys.executable, "-m", "hqqtrain"]
    with subprocess.Popen([*command, *job.words]) as process:
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            return process.wait()
        except KeyboardInterrupt:  # the job got it too: let it end in order
            process.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)


def _result(job: Job, code: int) -> str:
    """`done: 2.5 bits per weight, perplexity 9.10 quantized, 6.32 final`, as far as known."""
    if code != DONE:
        return "preempted" if code == PREEMPTED else f"failed with exit code {code}"
    summary = _read(job.folder / "summary.json")
    bits = summary.get("quantize", {}).get("bits_per_weight")
    measured = summary.get("eval", {})
    parts = [] if bits is None else [f"{bits:.2f} bits per weight"]
    for name in ("full_precision", "quantized", "final"):
        if (perplexity := measured.get(name, {}).get("perplexity")) is not None:
            parts.append(f"perplexity {perplexity:.3f} {name.replace('_', ' ')}")
    return ": ".join(["done", *filter(None, [", ".join(parts)])])


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
