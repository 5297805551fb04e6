"""Compare task=plan with measurements on this machine's GPU: peak memory and speed, in one table.

    python scripts/check_plan.py                     # all rows, about a minute each
    python scripts/check_plan.py 8b-4bit-full 70b    # some of them
    python scripts/check_plan.py --gpu H200          # predictions alone, without a GPU

Each row is a training of `bench_training.py`: a Llama with random weights, r=16 on all linears. It
is measured in a process of its own, after a few steps of warm-up.
"""

import argparse
import csv
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from bench_training import settings_of, start
from bench_training_inputs import Workload, write_inputs
from tabulate import tabulate

from hqqtrain.compose.compose import compose_config
from hqqtrain.distributed.preemption import PreemptionHandler
from hqqtrain.distributed.runtime import Runtime
from hqqtrain.distributed.strategies.check import RuntimeSettings
from hqqtrain.tasks.prediction import Prediction, Predictor


@dataclass(frozen=True)
class Row:
    """A training.

    Attributes:
        nbits: `quant.nbits`.
        checkpointing: `train.activation_checkpointing`.
        shape: A shape of `bench_training.py`.
        batch: Sequences of a step.
        tokens: Tokens of a sequence.
        options: Further settings.
    """

    nbits: int
    checkpointing: str
    shape: str = "8b"
    batch: int = 4
    tokens: int = 2048
    options: tuple[str, ...] = ()


ROWS = {
    "8b-4bit-full": Row(4, "full"),
    "8b-2bit-full": Row(2, "full"),
    "8b-4bit-none": Row(4, "none"),
    "8b-2bit-none": Row(2, "none"),
    "8b-4bit-offload": Row(4, "offload"),
    "8b-4bit-16-layers": Row(4, "16"),
    "8b-4bit-r64": Row(4, "full", options=("adapter.r=64",)),
    "8b-4bit-plain": Row(4, "full", options=("train.fused=false",)),
    "8b-4bit-short": Row(4, "full", batch=1),
    "8b-4bit-long": Row(4, "full", batch=1, tokens=32_768),
    "70b-2bit-full": Row(2, "full", shape="70b"),
}
"""The trainings by name."""

HEADER = ["row", "GiB", "predicted", "error", "tokens/s", "predicted", "error", "limited by"]


def predict(row: Row, workload: Workload, gpu: str) -> Prediction:
    """Return the plan of a row on `plan.gpu=gpu`."""
    keys = settings_of(workload, str(row.nbits), workload.folder)
    config = compose_config([*keys, f"plan.gpu={gpu}", "plan.gpus=1"])
    settings = RuntimeSettings.of_any_machine(config.quant)
    runtime = Runtime.start(settings, PreemptionHandler(config.run))
    return Predictor(runtime).predict(replace(config, task="finetune"))


def measure(row: Row, workload: Workload, folder: Path, steps: int) -> tuple[float, float]:
    """Return the peak in GiB and the median of tokens per second of `steps` steps."""
    contender = start(f"hqqtrain:{row.nbits}", workload, folder)
    try:
        contender.run(3)
        measured = contender.run(steps + 1)[1:]  # a pause is in the first
    finally:
        contender.signal(signal.SIGKILL)
        contender.process.wait()
    speed = statistics.median(step["tokens_per_second"] for step in measured)
    return max(step["peak_gib"] for step in measured), speed


def compare(name: str, row: Row, gpu: str, steps: int) -> list[object]:
    """Return the line of the table for a row; without `steps`, nothing is measured."""
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        model = folder / "model"
        model.mkdir()
        workload = Workload(model, row.batch, row.tokens, row.checkpointing, row.options)
        write_inputs(model, row.shape, workload)
        plan = predict(row, workload, gpu)
        gib, speed = measure(row, workload, folder, steps) if steps else (None, None)
    predicted_gib = plan.memory.peak / 2**30
    ((_, timed),) = plan.times.items()
    return [
        name, gib, predicted_gib, _error(predicted_gib, gib),
        speed, timed.tokens_per_second, _error(timed.tokens_per_second, speed), timed.limit,
    ]  # fmt: skip


def _error(predicted: float, measured: float | None) -> str:
    return "" if measured is None else f"{predicted / measured - 1:+.1%}"


def main(arguments: list[str]) -> int:
    """Print the table of the rows that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("rows", nargs="*", help=f"beginnings of names; all of {', '.join(ROWS)}")
    parser.add_argument("--gpu", help="only predict, for this GPU")
    parser.add_argument("--steps", type=int, default=4, help="steps of a row that count")
    parser.add_argument("--csv", type=Path, help="a file that gets the rows, too")
    parsed = parser.parse_args(arguments)
    chosen = [
        name for name in ROWS
        if not parsed.rows or any(name.startswith(word) for word in parsed.rows)
    ]  # fmt: skip
    lines = []
    for name in chosen:
        lines.append(
            compare(name, ROWS[name], parsed.gpu or "auto", 0 if parsed.gpu else parsed.steps)
        )
        table = tabulate(
            lines[-1:], HEADER, floatfmt=("", ".2f", ".2f", "", ",.0f", ",.0f", "", "")
        )
        print(table, flush=True)  # at once, in case a later row fails
    if parsed.csv:
        save(lines, parsed.csv)
    return 0


def save(lines: list[list[object]], path: Path) -> None:
    """Add the rows to a CSV file, with the GPU, the version of torch and the date."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow([*HEADER, "gpu", "torch", "date"])
        facts = [gpu, torch.__version__, time.strftime("%Y-%m-%d")]
        writer.writerows([*line, *facts] for line in lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
