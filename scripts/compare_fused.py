"""Compare the losses of training with fused kernels and without, under every strategy.

    python scripts/compare_fused.py --steps 200 --root /tmp/fused

For each strategy the script trains the bundled tiny model twice, with `train.fused=auto` and
`train.fused=false`, on two processes (one for `single`). It prints which linears a fused block
computes, the largest difference between the losses of a step, and that of the means of the last ten
steps. It exits with 1 if a difference is above `--tolerance`, or if no block was used. The steps
have several micro-batches, texts that share a row, and a layer that recomputes. The learning rate
is low, because Adam amplifies differences of rounding. On two idle cores, all strategies take about
15 minutes. Further settings of a run may follow after `--`.
"""

import argparse
import ast
import json
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hqqtrain.tracking.jsonl import read_metrics

RECIPE = (
    "recipe=tiny_2bit", "train.global_batch_size=4", "train.micro_batch_size=1",
    "train.max_seq_len=64", "train.precision=fp32", "train.activation_checkpointing=1",
    "quant.solver=rtn", "quant.calibration=null", "optim.lr=2e-4", "eval.source=null",
    "track.backends=[]",
)  # fmt: skip

RANKS = {"single": 1, "ddp": 2, "fsdp2": 2, "fsdp1": 2, "zero3": 2}
"""Processes of each strategy."""


PLAIN = ("zero3",)
"""Strategies that compute linears on PEFT's path: DeepSpeed's hooks gather their parameters."""


MODULES = 60
"""Modules whose functions are trained on: enough that no text repeats in 200 steps.

A model that learns a text by heart amplifies the rounding of a step to any size.
"""


class Difference(NamedTuple):
    """How far the losses of two trainings are apart, in nats.

    Attributes:
        largest: The largest difference at a step.
        last: The difference between the means of the last ten steps.
    """

    largest: float
    last: float

    @classmethod
    def between(cls, ours: Sequence[float], theirs: Sequence[float]) -> "Difference":
        """Compare the losses of the same steps."""
        pairs = list(zip(ours, theirs, strict=True))
        last = sum(a - b for a, b in pairs[-10:]) / len(pairs[-10:])
        return cls(max(abs(a - b) for a, b in pairs), abs(last))


def main() -> int:
    """Train twice with each strategy; return 0 if the losses agree, otherwise 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--strategies", nargs="+", choices=RANKS, default=list(RANKS))
    parser.add_argument("words", nargs="*", help="further settings, key=value")
    parser.add_argument("--tolerance", type=float, default=1e-3)
    options = parser.parse_args()
    options.root.mkdir(parents=True, exist_ok=True)
    text = write_texts(options.root / "texts.jsonl")
    agree = True
    for strategy in options.strategies:
        words = [*RECIPE, f"data.source={text}", f"train.max_steps={options.steps}",
                 f"parallel.strategy={strategy}", *options.words]  # fmt: skip
        fused, blocks = train(words, options.root / strategy, strategy, "auto")
        plain, _ = train(words, options.root / strategy, strategy, "false")
        found = Difference.between(fused, plain)
        is_fused = "q|k|v" in blocks or strategy in PLAIN
        agree &= found.largest <= options.tolerance and is_fused
        print(
            f"{strategy}: {len(fused)} steps, loss {fused[0]:.4f} -> {fused[-1]:.4f}, largest "
            f"difference {found.largest:.1e}, of the last ten {found.last:.1e}; {blocks}",
            flush=True,
        )
    return 0 if agree else 1


def write_texts(file: Path) -> Path:
    """Write functions of the standard library as texts, several of which share a row."""
    rows: list[str] = []
    for module in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:MODULES]:
        source = module.read_text(encoding="utf-8")
        texts = (ast.get_source_segment(source, node) for node in ast.walk(ast.parse(source))
                 if isinstance(node, ast.FunctionDef))  # fmt: skip
        rows += [json.dumps({"text": text}) for text in texts]
    file.write_text("\n".join(rows))
    return file


def train(words: Sequence[str], root: Path, strategy: str, fused: str) -> tuple[list[float], str]:
    """Train once, and return the loss of every step and what the log says of fused blocks."""
    launcher = [sys.executable, "-m", "hqqtrain"]
    if RANKS[strategy] > 1:
        launcher[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nnodes=1",
                         f"--nproc-per-node={RANKS[strategy]}"]  # fmt: skip
    name = f"fused-{fused}"
    command = [*launcher, *words, f"train.fused={fused}", f"run.root={root}", f"run.name={name}",
               "run.resume=never"]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = [line for line in read_metrics(root / name / "metrics.jsonl") if "train/loss" in line]
    log = done.stdout + done.stderr
    blocks = re.search(r"fused blocks: (.*)", log)
    return [line["train/loss"] for line in lines], blocks[1] if blocks else "no fused blocks"


if __name__ == "__main__":
    sys.exit(main())
