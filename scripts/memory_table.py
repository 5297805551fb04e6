"""Print the README's table: the longest sequence that fits on a GPU, by model and bits.

    python scripts/memory_table.py --write

The figures are those of `scripts/measure_memory.py`, if its file is there. Otherwise nothing is
measured, and the memory is that of `hqqtrain.loading.memory_estimate`, the estimate that every run
prints and checks before it reads a weight. `--write` replaces the table in README.md.
"""

import argparse
import csv
import re
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from tabulate import tabulate
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config

from hqqtrain.config.run import RunConfig
from hqqtrain.distributed.comm import SINGLE_PROCESS
from hqqtrain.distributed.strategies.unsharded import SingleProcess
from hqqtrain.loading.memory_check import WARNING_FRACTION
from hqqtrain.loading.memory_estimate import estimate_memory
from hqqtrain.models.build import build_meta, load_hf_config
from hqqtrain.models.source import shipped_folder
from hqqtrain.nn.lora import cast_adapters, lora_config
from hqqtrain.nn.replace import quantize_model
from hqqtrain.tasks.resources import workload_of

GPUS_GB = (8, 12, 16, 24, 48, 80)
NBITS = (4, 2)
LENGTHS = tuple(2**exponent for exponent in range(9, 16))
"""Tokens of a sequence: 512 to 32,768."""
README = Path(__file__).parents[1] / "README.md"
MEASURED = README.parent / "kernels/bench/results/memory.csv"
"""The file of `scripts/measure_memory.py`."""
BEGIN, END = "<!-- memory table -->\n", "<!-- end of memory table -->"

ESTIMATED = """\
Nothing in the table is measured: it is the **estimate** that every run prints before it reads a weight, with 10 % to
spare."""  # noqa: E501
MEASURED_ON = """\
The table was **measured** on one {gpu} whose memory was limited to that of the smaller GPU, with random weights
({date}, torch {torch}, transformers {transformers}; `kernels/bench/results/memory.csv`). Every run makes an
estimate of its own, with 10 % to spare, before it reads a weight."""  # noqa: E501

PARTLY_ESTIMATED = " Cells with ~ are only estimated."


def model_configs() -> dict[str, PretrainedConfig]:
    """Return the shapes of well-known models by name, as their config.json has them."""
    llama: dict[str, Any] = {
        "vocab_size": 128256,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    }
    qwen: dict[str, Any] = {"vocab_size": 152064, "hidden_size": 5120, "num_attention_heads": 40,
                            "num_key_value_heads": 8}  # fmt: skip
    return {
        "Llama 3.2 1B": LlamaConfig(
            hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
            num_attention_heads=32, tie_word_embeddings=True, **llama,
        ),
        "Llama 3.2 3B": LlamaConfig(
            hidden_size=3072, intermediate_size=8192, num_hidden_layers=28,
            num_attention_heads=24, tie_word_embeddings=True, **llama,
        ),
        "Llama 3 8B": _shipped("Meta-Llama-3-8B"),
        "Qwen2.5 14B": Qwen2Config(intermediate_size=13824, num_hidden_layers=48, **qwen),
        "Qwen2.5 32B": Qwen2Config(intermediate_size=27648, num_hidden_layers=64, **qwen),
        "Llama 3 70B": _shipped("Meta-Llama-3-70B"),
    }  # fmt: skip


def memory_run(nbits: int) -> RunConfig:
    """Return the run of the table: the defaults in bf16, and eval.reference=off."""
    run = RunConfig()
    run.quant.nbits, run.train.precision, run.eval.reference = nbits, "bf16", "off"
    return run


def estimated_lengths(config: PretrainedConfig, nbits: int) -> dict[int, int | None]:
    """Return GB of a GPU -> tokens of the longest sequence that fits, or None if none does."""
    run = memory_run(nbits)
    base = build_meta(config, torch.bfloat16)
    quantize_model(base, run.quant, compute_dtype=torch.bfloat16)
    model = get_peft_model(base, lora_config(run.adapter, base), low_cpu_mem_usage=True)
    cast_adapters(model, torch.float32)
    longest: dict[int, int | None] = dict.fromkeys(GPUS_GB)
    for length in LENGTHS:
        run.train.max_seq_len = length
        needs = estimate_memory(
            workload_of(run), model, SingleProcess(SINGLE_PROCESS), dtype=torch.bfloat16
        )
        for gpu in GPUS_GB:
            if sum(needs.device.values()) <= WARNING_FRACTION * gpu * 1e9:
                longest[gpu] = length
    return longest


def measured_lengths(rows: list[dict[str, str]], name: str, nbits: int) -> dict[int, int | None]:
    """Return the same as `estimated_lengths` for the GPUs that `rows` of a file decide.

    A GPU fits what a smaller one fits, and not what a larger one does not fit. A length is decided
    if the next longer one does not fit.
    """
    longest: dict[int, int | None] = {}
    rows = [row for row in rows if (row["model"], row["nbits"]) == (name, str(nbits))]
    for gpu in GPUS_GB:
        fitting = [
            int(row["tokens"]) for row in rows
            if row["fits"] == "fits" and int(row["gpu_gb"]) <= gpu and int(row["tokens"])
        ]  # fmt: skip
        failing = [
            int(row["tokens"]) for row in rows
            if row["fits"] != "fits" and int(row["gpu_gb"]) >= gpu
        ]  # fmt: skip
        untried = LENGTHS[LENGTHS.index(max(fitting)) + 1 :] if fitting else LENGTHS
        if not untried or (failing and min(failing) <= untried[0]):
            longest[gpu] = max(fitting, default=None)
    return longest


def table_row(
    name: str, nbits: int, estimated: dict[int, int | None],
    measured: dict[int, int | None] | None = None,
) -> list[str]:  # fmt: skip
    """Return a row of the table; with measurements, the other cells get the mark `~`."""
    cells = []
    for gpu, tokens in (estimated | (measured or {})).items():
        mark = "~" if measured is not None and gpu not in measured else ""
        cells.append(mark + ("-" if tokens is None else f"{tokens:,}"))
    return [name, str(nbits), *cells]


def render_table(measured: Path = MEASURED) -> str:
    """Return the table in Markdown, after a sentence that says where its figures come from."""
    source, origin, rows = "estimated", ESTIMATED, []
    measurements: list[dict[str, str]] = []
    if measured.is_file():
        with measured.open(newline="", encoding="utf-8") as file:
            measurements = list(csv.DictReader(file))
        source, origin = "measured", MEASURED_ON.format(**measurements[0])
    for name, config in model_configs().items():
        for nbits in NBITS:
            found = measured_lengths(measurements, name, nbits) if measurements else None
            rows.append(table_row(name, nbits, estimated_lengths(config, nbits), found))
    if any(cell.startswith("~") for row in rows for cell in row):
        origin += PARTLY_ESTIMATED
    headers = [source, "bits", *(f"{gpu} GB" for gpu in GPUS_GB)]
    align = ["left", *["right"] * (len(headers) - 1)]
    table = tabulate(rows, headers, tablefmt="pipe", colalign=align, disable_numparse=True)
    return f"{origin}\n\n{table}"


def _shipped(name: str) -> PretrainedConfig:
    folder = shipped_folder(name)
    assert folder is not None, name
    return load_hf_config(folder)


def main() -> None:
    """Print the table, or write it into README.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace the table in README.md")
    table = f"{render_table()}\n"
    if not parser.parse_args().write:
        print(table, end="")
        return
    text = README.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    README.write_text(pattern.sub(lambda _: f"{BEGIN}{table}{END}", text), encoding="utf-8")


if __name__ == "__main__":
    main()
