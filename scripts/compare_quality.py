"""Print a table of the quality that models keep when hqqtrain quantizes them, untrained.

    python scripts/fetch_real_model.py smollm2
    python scripts/fetch_texts.py texts
    python scripts/compare_quality.py smollm2 --text texts/code --calibration texts/prose

Each row is a run of `task=eval` in a process of its own, so the figures are those of the product,
with its time and memory. `compare_solvers.py` compares the solvers as functions instead, beside the
hqq library. A row gives the perplexity as a multiple of that of full precision, the KL divergence
and the top-1 agreement with full precision on the held-out part of `--text`, the seconds of
quantizing, and the peak of memory until then: that of the GPU where there is one, else that of the
process.

Without `--row`, data-free solvers are compared, and with `--calibration` calibrated ones, too.
`--row` names others by keys of the group `quant`; with `--calibration`, those of a solver that uses
text are calibrated unless they say `calibration=null`. Arguments such as `train.precision=fp32` are
passed on to every run.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tabulate import tabulate

DATA_FREE = ("solver=rtn", "solver=hqq", "solver=least_squares")
CALIBRATED = ("solver=least_squares", "solver=gptq")
HEADER = ("model", "quant", "bits", "axis", "perplexity", "KL", "top-1", "seconds", "peak GiB")


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments; `rows` has the settings of each row, and `overrides` those of all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("arguments", nargs="+", metavar="MODEL|KEY=VALUE", help="models, and settings of all runs")
    add("--text", default="python_stdlib", help="data.source whose held-out part is measured")
    add(
        "--calibration",
        help="quant.calibration of the calibrated rows: auto, the training part of --text, or "
        "another source",
    )
    add("--row", action="append", help='settings of a row, such as "solver=hqq zero=integer"')
    add("--nbits", type=int, nargs="+", default=[4, 3, 2])
    add("--axis", type=int, nargs="+", default=[1])
    add("--group-size", type=int, default=64)
    add("--tokens", type=int, default=65536, help="held-out tokens that are measured")
    add("--length", type=int, default=512, help="tokens of a sequence")
    options = parser.parse_intermixed_args(words)
    options.models = [word for word in options.arguments if "=" not in word]
    options.overrides = [word for word in options.arguments if "=" in word]
    options.rows = options.row or list(DATA_FREE)
    if options.calibration:
        calibrated = [_calibrate(row, options.calibration) for row in options.row or CALIBRATED]
        options.rows = calibrated if options.row else options.rows + calibrated
    if not options.models:
        parser.error("name at least one model")
    if any(f"calibration={options.text}" in row.split() for row in options.rows):
        parser.error(
            f"calibration={options.text} is the text that is measured; name another source, or auto"
        )
    return options


def _calibrate(row: str, source: str) -> str:
    """Return `row` with a calibration text, if its solver uses one and the row names none."""
    uses_text = not set(CALIBRATED).isdisjoint(row.split())
    return f"{row} calibration={source}" if uses_text and "calibration=" not in row else row


def run_words(
    model: str, row: str, nbits: int, axis: int, options: argparse.Namespace
) -> list[str]:
    """Return the arguments of the run of one row.

    A row that does not name a calibration is data-free, whatever the default is.
    """
    settings = row.split()
    if not any(word.startswith("calibration=") for word in settings):
        settings.append("calibration=null")
    return [
        "task=eval", f"model.name_or_path={model}", f"data.source={options.text}",
        f"eval.tokens={options.tokens}", f"train.max_seq_len={options.length}",
        f"quant.nbits={nbits}", f"quant.axis={axis}", f"quant.group_size={options.group_size}",
        *(f"quant.{word}" for word in settings), "track.backends=[]", *options.overrides,
    ]  # fmt: skip


def run_product(words: list[str], root: Path) -> dict[str, Any] | str:
    """Run hqqtrain.

    Args:
        words: The arguments of its command line.
        root: The folder for the run directory.

    Returns:
        The summary, or the message of a run that failed: its first "error:" line, else its last.
    """
    command = [sys.executable, "-m", "hqqtrain", *words, f"run.root={root}", "run.name=run"]
    process = subprocess.run(
        command, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if process.returncode:
        lines = process.stdout.strip().splitlines() or [f"exit code {process.returncode}"]
        return next((line for line in lines if "error:" in line), lines[-1]).strip()
    return json.loads((root / "run" / "summary.json").read_text())


def figures(summary: dict[str, Any]) -> list[float | None]:
    """Return the figures of a row, in the order of `HEADER`; None: not measured, or infinite."""
    full, quantized = summary["eval"]["full_precision"], summary["eval"]["quantized"]
    perplexity, quantize = quantized["perplexity"], summary["quantize"]
    return [
        None if perplexity is None else perplexity / full["perplexity"],
        quantized.get("kl"),
        quantized.get("top1_agreement"),
        quantize.get("seconds"),
        quantize.get("peak_memory_gib"),
    ]


def main() -> int:
    """Run all rows, print the table, and return 1 if a run failed."""
    options = parse_arguments()
    table: list[list[Any]] = []
    notes: list[str] = []
    every = itertools.product(options.models, options.rows, options.nbits, options.axis)
    for model, row, nbits, axis in every:
        with tempfile.TemporaryDirectory() as root:
            result = run_product(run_words(model, row, nbits, axis, options), Path(root))
        name, settings = Path(model).name, row.replace("solver=", "")
        if isinstance(result, str):
            notes.append(f"Failed: {name}, {settings}, {nbits} bits, axis {axis}: {result}")
            continue
        table.append([name, settings, nbits, axis, *figures(result)])
        cells = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in table[-1])
        print(
            *map(" ".join, zip(HEADER, cells, strict=True)), sep=", ", file=sys.stderr, flush=True
        )
        perplexity = result["eval"]["full_precision"]["perplexity"]
        note = f"Perplexity of {name} in full precision, on {options.text}: {perplexity:.4g}"
        if note not in notes:
            notes.append(note)
    formats = ("", "", "", "", ",.4g", ".4f", ".4f", ".1f", ".2f")
    print(tabulate(table, HEADER, tablefmt="github", floatfmt=formats, missingval="-"))
    print("", *notes, sep="\n")
    return int(any(note.startswith("Failed") for note in notes))


if __name__ == "__main__":
    sys.exit(main())
