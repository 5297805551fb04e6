"""Print the README's table: the longest sequence that fits on a GPU, by model and bits.

    python scripts/memory_table.py --write

The memory is that of task=plan on GPUs of these sizes. `--write` replaces the table in README.md.
"""

import argparse
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
from hqqtrain.tasks.machine import gpu_machine
from hqqtrain.tasks.resources import workload_of

GPUS_GB = (8, 12, 16, 24, 48, 80)
NBITS = (4, 2)
LENGTHS = tuple(2**exponent for exponent in range(9, 16))
"""Tokens of a sequence: 512 to 32,768."""
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- memory table -->\n", "<!-- end of memory table -->"

ORIGIN = """\
The table is what `task=plan` **predicts** (`docs/plan.md`), with 10 % of the memory to spare.
Its peaks are within 2 % of those of 16 trainings of up to 8,192 tokens on one H200."""


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
            if needs.peak <= WARNING_FRACTION * gpu_machine(f"{gpu}GB").usable:
                longest[gpu] = length
    return longest


def table_row(name: str, nbits: int, lengths: dict[int, int | None]) -> list[str]:
    """Return a row of the table."""
    cells = ("-" if tokens is None else f"{tokens:,}" for tokens in lengths.values())
    return [name, str(nbits), *cells]


def render_table() -> str:
    """Return the table in Markdown, after a sentence that says where its figures come from."""
    rows = [
        table_row(name, nbits, estimated_lengths(config, nbits))
        for name, config in model_configs().items()
        for nbits in NBITS
    ]
    headers = ["predicted", "bits", *(f"{gpu} GB" for gpu in GPUS_GB)]
    align = ["left", *["right"] * (len(headers) - 1)]
    table = tabulate(rows, headers, tablefmt="pipe", colalign=align, disable_numparse=True)
    return f"{ORIGIN}\n\n{table}"


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
