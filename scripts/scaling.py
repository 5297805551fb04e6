"""Predicts memory, traffic and time of FSDP2 training with HQQ, and writes docs/scaling.md.

    python scripts/scaling.py --write

No machine of this project has more than two GPUs. What follows is arithmetic over shapes, with two
numbers fitted to one measurement (`FITTED_TO`); the other measurements say how far to trust it.
Memory is `hqqtrain.loading.memory_estimate`, the estimate that every run prints.
"""

import argparse
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import get_peft_model
from tabulate import tabulate
from torch import nn

from hqqtrain.config.run import RunConfig
from hqqtrain.distributed.comm import SINGLE_PROCESS
from hqqtrain.distributed.strategies.fsdp2 import FSDP2
from hqqtrain.distributed.strategies.unsharded import SingleProcess
from hqqtrain.loading.memory_estimate import estimate_memory
from hqqtrain.models.build import build_meta, load_hf_config
from hqqtrain.models.fqn import base_model
from hqqtrain.models.source import shipped_folder
from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain.nn.lora import cast_adapters, lora_config
from hqqtrain.nn.replace import quantize_model
from hqqtrain.tasks.resources import workload_of
from hqqtrain.train.metrics import flops_per_token

GIB, TOKENS = 2**30, 2048
GPUS_OF_A_NODE = 8
PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"


@dataclass(frozen=True)
class Card:
    """A GPU: matrix products (FLOP/s) and a copy (bytes/s), both measured by kernels/bench; what
    one sends and receives within a node and between nodes, bytes/s, of the data sheets, times 0.7.
    """

    name: str
    products: float
    copy: float
    within: float = 0.7 * 450e9
    between: float = 0.7 * 50e9

    def link(self, gpus: int) -> float:
        """Of an all-gather over so many: the slowest hop."""
        return self.within if gpus <= GPUS_OF_A_NODE else self.between


H100 = Card("H100", 660e12, 2.95e12)
H200 = Card("H200", 780e12, 4.2e12)


@dataclass(frozen=True)
class Measured:
    """A step of one sequence of TOKENS tokens a GPU: kernels/bench/results/*-large-models.csv."""

    model: str
    nbits: int
    group_size: int
    card: Card
    seconds: float
    gib: float
    gpus: int = 1


FITTED_TO = Measured("Llama-2-70b-hf", 2, 64, H100, TOKENS / 950.91, 23.51)
OTHERS = (
    Measured("Llama-3.1-405B", 2, 128, H200, TOKENS / 167.17, 120.64),
    Measured("Meta-Llama-3-70B", 2, 64, H100, 2 * TOKENS / 1625.63, 20.79, gpus=2),
    Measured("Llama-3.1-405B", 2, 128, H100, 2 * TOKENS / 366.76, 75.34, gpus=2),
)

EFFICIENCY = 0.66
"""Of the products of whole layers, beside those of the benchmark. Fitted."""
UNPACKING = 0.94
"""Of a copy's speed, when weights are dequantized: kernels/bench."""


@dataclass(frozen=True)
class Prediction:
    """Of one rank: GiB at most, GiB received in a step, seconds of its own work and of the wire."""

    gib: float
    received_gib: float
    work: float
    wire: float

    @property
    def seconds(self) -> float:
        """Gathers run ahead while a layer is computed, so the longer of the two is what counts."""
        return max(self.work, self.wire)


def predict(name: str, nbits: int, group_size: int, card: Card, gpus: int) -> Prediction:
    """A step of TOKENS tokens a rank: LoRA r=16 in bf16 on all linears, 8-bit AdamW's memory,
    checkpointed layers whose inputs are offloaded; the base sharded over all `gpus`.

    Work: forward, recomputed forward and gradient (flops_per_token has the first and the last),
    and each weight dequantized as often. Wire: the packed layers gathered twice, forward and
    backward, embeddings and head once, and the adapters' gradients summed up.
    """
    config, model = _model(name, nbits, group_size)
    workload = workload_of(config, offloads_activations=True)
    single = SingleProcess(SINGLE_PROCESS)
    strategy = FSDP2(SINGLE_PROCESS) if gpus > 1 else single
    needs = estimate_memory(workload, model, strategy, dtype=torch.bfloat16, world_size=gpus).device
    sizes = estimate_memory(workload, model, single, dtype=torch.bfloat16).device
    weights = sum(m.out_features * m.in_features
                  for m in model.modules() if isinstance(m, HQQLinear))  # fmt: skip
    packed, trained = sizes["packed weights"], sizes["adapter and optimizer"] / 3
    others = (gpus - 1) / gpus
    received = others * (2 * packed + sizes["dense weights"] + 2 * trained)
    products = 1.5 * flops_per_token(model) * TOKENS / (card.products * EFFICIENCY)
    unpacking = 3 * (2 * weights + packed) / (card.copy * UNPACKING)
    return Prediction(sum(needs.values()) / GIB, received / GIB, products + unpacking,
                      received / card.link(gpus))  # fmt: skip


@functools.cache
def _model(name: str, nbits: int, group_size: int) -> tuple[RunConfig, nn.Module]:
    config = RunConfig()
    config.quant.nbits, config.quant.group_size = nbits, group_size
    config.adapter.r, config.adapter.dtype = 16, "bf16"
    config.optim.name, config.eval.source = "adamw_8bit", None
    config.parallel.offload, config.model.source = "activations", "synthetic"
    config.train.max_seq_len = TOKENS
    folder = shipped_folder(name)
    assert folder is not None, name
    model = build_meta(load_hf_config(folder), torch.bfloat16)
    quantize_model(model, config.quant)
    model = get_peft_model(
        base_model(model), lora_config(config.adapter, model), low_cpu_mem_usage=True
    )
    cast_adapters(model, torch.bfloat16)
    return config, model


def page() -> str:
    """docs/scaling.md."""
    checks = [_checked(each) for each in (FITTED_TO, *OTHERS)]
    head = ("model", "nbits", "GPUs", "GiB a GPU", "GiB received", "work, s", "wire, s", "tokens/s")
    return TEXT.format(
        checks=tabulate(checks, CHECKED, tablefmt="github"),
        table=tabulate(list(_rows()), head, tablefmt="github", disable_numparse=True),
    )


def _checked(each: Measured) -> tuple:
    found = predict(each.model, each.nbits, each.group_size, each.card, each.gpus)
    gpus = f"{each.gpus} x {each.card.name}"
    return (
        each.model, gpus, f"{each.seconds:.2f}", f"{found.seconds:.2f}",
        f"{found.seconds / each.seconds - 1:+.0%}", f"{each.gib:.1f}", f"{found.gib:.1f}",
        f"{found.gib / each.gib - 1:+.0%}", "fitted" if each is FITTED_TO else "",
    )  # fmt: skip


def _rows() -> Iterator[tuple]:
    for name in ("Meta-Llama-3-8B", "Meta-Llama-3-70B", "Llama-3.1-405B"):
        for nbits in (4, 2, 1):
            for gpus in (1, 8, 64, 1024):
                found = predict(name, nbits, 64, H100, gpus)
                rate = gpus * TOKENS / found.seconds
                fits = "" if found.gib < 76 else " (does not fit 80)"
                yield (name, nbits, gpus, f"{found.gib:.1f}{fits}", f"{found.received_gib:.1f}",
                       f"{found.work:.2f}", f"{found.wire:.2f}", f"{rate:,.0f}")  # fmt: skip


CHECKED = ("model, 2 bits", "GPUs", "s a step", "predicted", "", "GiB", "predicted", "", "")
TEXT = """# How it scales: a prediction

Written by `python scripts/scaling.py --write`; the script is the model, and says what it assumes.
FSDP2 over H100s, 8 to a node (NVLink within, 400 Gbit/s a GPU between), one sequence of 2,048
tokens a GPU and step, groups of 64, LoRA r=16 in bf16 on all linear layers, 8-bit AdamW,
checkpointed layers with their inputs offloaded. **Nothing was measured on more than two GPUs.**

## Checked against what was measured

{checks}

The efficiency of products (0.66) is fitted to the first row; the others are predictions. Their
distance is how far to trust the rest. Between two GPUs of a node the wire hides behind the work;
between nodes it is not checked by anything.

## Predicted

{table}

What to read from it: gathering packed weights instead of bf16 ones saves a factor of 3.6 (4 bits)
to 11 (1 bit) of what linear layers put on the wire. Between nodes it is still what a small batch
waits for, at 4 bits above all. Larger batches a GPU hide it: work grows with tokens, the wire does
not. Sharding within a node and replicating between nodes (parallel.hsdp=true, not in the table)
leaves nothing but adapters' gradients to the slow links, for the memory of 8 GPUs.
"""


def main() -> None:
    """Prints the page, or writes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    if parser.parse_args().write:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page())


if __name__ == "__main__":
    main()
