"""Measure our kernels and the peers in one run, and report which goals are reached.

    python kernels/bench/run.py                          everything: about 3 minutes on an H100
    python kernels/bench/run.py linear --csv FILE.csv    one part
    python kernels/bench/run.py --smoke                  toy sizes on a CPU: does it run?

The peers are hqq, bitsandbytes, gemlite and, behind `F.linear`, cuBLAS. Install those to compare
with. Times of one run may be compared with each other, times of two runs may not.
"""

import argparse
import collections
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tabulate import tabulate

import dequantize
import goals
import linear
import overhead
import quantize
from hqqtrain_kernels import backend
from record import Row, line, run_columns, write
from sizes import Sizes, full, smoke
from timing import Limits, limits

PARTS: dict[str, Callable[[Sizes, Limits], Iterator[Row]]] = {
    "quantize": quantize.rows,
    "dequantize": dequantize.rows,
    "linear": linear.rows,
    "overhead": overhead.rows,
}


def main() -> None:
    """Run the requested parts, print every row at once, and write the CSV file."""
    options = _options()
    if not (options.smoke or torch.cuda.is_available()):
        raise SystemExit("run.py: no GPU here. --smoke runs toy sizes on a CPU.")
    torch.manual_seed(0)
    sizes = smoke() if options.smoke else full()
    shared, machine = run_columns(sizes.device), limits(sizes.device, sizes.product)
    chosen = backend.set_backend(options.backend)
    print(f"{shared['gpu']}, {shared['versions']}, {shared['date']}; {chosen}")
    print(
        f"copy {machine.bandwidth / 1e12:.3f} TB/s, product {machine.operations / 1e12:.1f} TFLOP/s"
    )
    rows: list[Row] = []
    for part in options.parts or PARTS:
        rows += _measure(part, sizes, machine)
        if options.csv:
            write(options.csv, rows, shared)
    _conclude(rows, sizes)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], metavar="PART", default=[])
    parser.add_argument("--csv", type=Path, help="the file to write")
    parser.add_argument("--smoke", action="store_true", help="toy sizes")
    parser.add_argument(
        "--backend", choices=backend.BACKENDS, default="auto", help="backend of our kernels"
    )
    return parser.parse_args()


def _measure(part: str, sizes: Sizes, machine: Limits) -> list[Row]:
    began, rows = time.perf_counter(), []
    for row in PARTS[part](sizes, machine):
        print(line(row), flush=True)
        rows.append(row)
    print(f"-- {part}: {time.perf_counter() - began:.0f} s", flush=True)
    return rows


def _conclude(rows: list[Row], sizes: Sizes) -> None:
    table = goals.table(rows, sizes)
    lines = [(goal.what, goal.goal, goal.shown, goal.verdict) for goal in table]
    print(tabulate(lines, ["", "goal", "figure", ""], tablefmt="github"))
    counts = collections.Counter(goal.verdict for goal in table)
    print(", ".join(f"{counts[verdict]} {verdict}" for verdict in ("pass", "missed", "not run")))


if __name__ == "__main__":
    main()
