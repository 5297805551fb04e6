"""Measure training speed and memory: hqqtrain beside other tools, in turns, in one run.

    python scripts/bench_training.py hqqtrain:4 hqqtrain:2 unsloth --checkpointing full
    python scripts/bench_training.py hqqtrain:4 hqqtrain:4@../before --shape 70b
    python scripts/bench_training.py hqqtrain:4,parallel.strategy=fsdp2 hqqtrain:4
    python scripts/bench_training.py hqqtrain:4,data.source=documents.jsonl hqqtrain:4

A contender is `hqqtrain:BITS`, with `@FOLDER` from another source tree and with settings of its own
after commas, or a peer of `bench_training_peers.py`. A setting in capitals is an environment
variable: `PYTORCH_ALLOC_CONF=per_process_memory_fraction:0.1` limits the memory. Each contender is
a process that trains without an end and writes a line for every step. All are loaded at the same
time, and then they take turns: a contender runs for some steps while the others are stopped by a
signal, so that a change of the clock or of the machine meets all of them. The table has the
medians, and the ratio to the last contender.

The texts fill a sequence, or those of `documents.jsonl` are packed, with a median of 300 tokens.

All train LoRA adapters of rank 16 on all linear layers of a Llama with random weights, with AdamW,
in bf16. A step is one forward and one backward pass.
"""

import argparse
import contextlib
import csv
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bench_training_inputs import SHAPES, Workload, write_inputs
from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "scripts" / "bench_training_peers.py"
START_SECONDS = 600
"""Time that a contender has to load its model and to take its first steps."""


@dataclass
class Contender:
    """A process that trains, and the steps that were measured.

    Attributes:
        name: The word of the command line.
        process: It is the leader of its process group.
        lines: The file to which it adds a line of JSON for every step.
        measured: The steps that count.
    """

    name: str
    process: subprocess.Popen[bytes]
    lines: Path
    log: Path
    measured: list[dict[str, float]] = field(default_factory=list)

    def steps(self) -> list[dict[str, float]]:
        """Return all steps so far: `tokens_per_second` and `peak_gib` of each."""
        text = self.lines.read_text() if self.lines.exists() else ""
        rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        keys = {"tokens_per_second": "train/tokens_per_second", "peak_gib": "memory/peak_gib"}
        trained = (row for row in rows if keys["tokens_per_second"] in row)
        return [{name: row[key] for name, key in keys.items()} for row in trained]

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def run(self, steps: int, seconds: float = START_SECONDS) -> list[dict[str, float]]:
        """Let it take `steps` more steps, and return them; it is stopped afterwards.

        Raises:
            RuntimeError: It ended, or needs longer than `seconds`.
        """
        before = len(self.steps())
        self.signal(signal.SIGCONT)
        self.wait(before + steps, seconds)
        self.signal(signal.SIGSTOP)
        return self.steps()[before : before + steps]

    def wait(self, steps: int, seconds: float = START_SECONDS) -> None:
        """Wait until it has taken `steps` steps in all.

        Raises:
            RuntimeError: It ended, or needs longer than `seconds`.
        """
        end = time.monotonic() + seconds
        while len(self.steps()) < steps:
            if self.process.poll() is not None or time.monotonic() > end:
                tail = self.log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{self.name} took too few steps; the end of its log:\n{tail}")
            time.sleep(0.02)


def start(name: str, workload: Workload, folder: Path) -> Contender:
    """Start a contender."""
    word, *settings = name.split(",")
    tool, _, rest = word.partition(":")
    log = folder / (re.sub(r"[^\w.-]+", "-", name) + ".log")
    variables = dict(each.split("=", 1) for each in settings if each.partition("=")[0].isupper())
    options = [each for each in settings if each.partition("=")[0] not in variables]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **variables}
    if tool == "hqqtrain":
        nbits, _, tree = rest.partition("@")
        source = Path(tree).resolve() if tree else ROOT
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(source), str(source / "kernels"), os.environ.get("PYTHONPATH", "")]
        )
        root = folder / f"runs-{log.stem}"
        command = [sys.executable, "-m", "hqqtrain", *settings_of(workload, nbits or "4", root),
                   *options]  # fmt: skip
        lines = root / "bench" / "metrics.jsonl"
    else:
        lines = folder / f"{tool}.jsonl"
        arguments = [
            str(workload.folder), str(lines), str(workload.batch), str(workload.tokens),
            workload.checkpointing,
        ]  # fmt: skip
        subprocess.run([sys.executable, PEERS, "save", *arguments], check=True, env=environment)
        command = [sys.executable, str(PEERS), tool, *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, start_new_session=True,
            cwd=workload.folder,
        )  # fmt: skip
    return Contender(name, process, lines, log)


def settings_of(workload: Workload, nbits: str, root: Path) -> Iterator[str]:
    """Yield the settings of hqqtrain. A run has more steps than will be measured."""
    yield from (
        "recipe=tiny_2bit", f"model.name_or_path={workload.folder}", "model.source=synthetic",
        f"quant.nbits={nbits}", "quant.group_size=64", "quant.solver=rtn", "quant.calibration=null",
        "quant.save=false", "adapter.r=16", "adapter.alpha=16", "optim.name=adamw",
        "data.source=data.jsonl", "data.format=tokens", "eval.source=null",
        "track.backends=[]", "ckpt.every=null",
        f"train.global_batch_size={workload.batch}", f"train.micro_batch_size={workload.batch}",
        f"train.max_seq_len={workload.tokens}", "train.max_steps=100000", f"run.root={root}",
        "run.name=bench", f"train.activation_checkpointing={workload.checkpointing}",
        *workload.options,
    )  # fmt: skip


def measure(contenders: list[Contender], rounds: int, steps: int) -> None:
    """Let the contenders take turns of `steps` steps, after one that has a pause in it."""
    for _ in range(rounds):
        for contender in contenders:
            contender.measured += contender.run(steps + 1)[1:]


def table(contenders: list[Contender]) -> list[list[Any]]:
    """Return name, median of tokens per second, ratio to the last, and peak GiB of each."""
    speed = {
        c.name: statistics.median(step["tokens_per_second"] for step in c.measured)
        for c in contenders
    }
    last = speed[contenders[-1].name]
    return [
        [c.name, speed[c.name], speed[c.name] / last, max(step["peak_gib"] for step in c.measured)]
        for c in contenders
    ]


HEADER = ["contender", "tokens/s", "ratio to the last", "peak GiB"]


def save(rows: list[list[Any]], path: Path, settings: str) -> None:
    """Add the rows to a CSV file, with the settings, the GPU, the versions and the date."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    facts = [settings, gpu, torch.__version__, time.strftime("%Y-%m-%d")]
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow([*HEADER, "settings", "gpu", "torch", "date"])
        writer.writerows([*row, *facts] for row in rows)


def main(arguments: list[str]) -> int:
    """Measure the contenders that the command line names, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    words = "hqqtrain:4, hqqtrain:2@FOLDER,KEY=VALUE, unsloth, bnb"
    parser.add_argument("contenders", nargs="+", help=words)
    parser.add_argument("--shape", choices=SHAPES, default="8b", help="sizes of the Llama")
    parser.add_argument("--layers", type=int, help="decoder layers, if not those of the shape")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--checkpointing", default="full", help="train.activation_checkpointing")
    parser.add_argument("--option", action="append", default=[], help="a setting of hqqtrain")
    parser.add_argument("--warmup", type=int, default=4, help="steps before the first turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn that count")
    parser.add_argument("--csv", type=Path, help="a file that gets the rows, too")
    parsed = parser.parse_args(arguments)
    if parsed.layers:
        SHAPES[parsed.shape] = SHAPES[parsed.shape] | {"num_hidden_layers": parsed.layers}
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        model = folder / "model"
        model.mkdir()
        workload = Workload(
            model, parsed.batch, parsed.tokens, parsed.checkpointing, tuple(parsed.option)
        )
        write_inputs(model, parsed.shape, workload)
        contenders = []
        for word in parsed.contenders:
            contenders.append(start(word, workload, folder))
            stack.callback(contenders[-1].signal, signal.SIGKILL)
        for contender in contenders:
            contender.wait(parsed.warmup)
            contender.signal(signal.SIGSTOP)
        measure(contenders, parsed.rounds, parsed.steps)
    rows = table(contenders)
    print(tabulate(rows, HEADER, floatfmt=("", ",.0f", ".3f", ".1f")))
    if parsed.csv:
        save(rows, parsed.csv, " ".join(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
