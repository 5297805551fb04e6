"""Predict memory, traffic and time of FSDP2 training with HQQ, and write docs/scaling.md.

    python scripts/scaling.py --write

This project has never used more than two GPUs at once. The prediction is arithmetic on shapes, with
one factor (`EFFICIENCY`) fitted to one measurement (`FITTED_TO`). The other measurements show how
far to trust it. The memory is `hqqtrain.models.estimate`, the estimate that every run prints.
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

from hqqtrain.config import RunConfig
from hqqtrain.models import base_model, build_meta, config_of, estimate
from hqqtrain.models.source import shipped_folder
from hqqtrain.nn import HQQLinear, cast_adapters, lora_config, quantize_model
from hqqtrain.train.flops import flops_per_token

GIB, TOKENS = 2**30, 2048
GPUS_OF_A_NODE = 8
PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"


@dataclass(frozen=True)
class Card:
    """Speed of a GPU and of its links.

    Attributes:
        name: Name of the GPU.
        products: Matrix products in FLOP/s, measured by kernels/bench.
        copy: Bytes per second of a copy, measured by kernels/bench.
        within: Bytes per second that a GPU sends and receives within a node: 0.7 of the data sheet.
        between: The same between nodes.
    """

    name: str
    products: float
    copy: float
    within: float = 0.7 * 450e9
    between: float = 0.7 * 50e9

    def link(self, gpus: int) -> float:
        """Return the bytes per second of an all-gather over `gpus` GPUs: its slowest hop."""
        return self.within if gpus <= GPUS_OF_A_NODE else self.between


H100 = Card("H100", 660e12, 2.95e12)
H200 = Card("H200", 780e12, 4.2e12)


@dataclass(frozen=True)
class Measured:
    """A measured step with one sequence of TOKENS tokens per GPU.

    The values are from kernels/bench/results/*-large-models.csv.
    """

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
"""Speed of the products in whole layers, relative to those of the benchmark. Fitted."""
UNPACKING = 0.94
"""Speed of dequantizing, relative to a copy. Measured by kernels/bench."""


@dataclass(frozen=True)
class Prediction:
    """Cost of a step on one rank.

    Attributes:
        gib: Peak memory in GiB.
        received_gib: GiB received in a step.
        work: Seconds of computation.
        wire: Seconds of communication.
    """

    gib: float
    received_gib: float
    work: float
    wire: float

    @property
    def seconds(self) -> float:
        """Seconds of a step: all-gathers are prefetched, so the longer of work and wire counts."""
        return max(self.work, self.wire)


def predict(name: str, nbits: int, group_size: int, card: Card, gpus: int) -> Prediction:
    """Predict a step of TOKENS tokens per rank, with the base sharded over all `gpus`.

    The adapter is LoRA with r=16 in bf16 on all linears. The memory is that of 8-bit AdamW and of
    activation checkpointing with offloaded layer inputs.

    Args:
        name: A model whose config.json is in the package.
        nbits: Bits of a code.
        group_size: Weights that share a scale and a zero.
        card: The GPU.
        gpus: Number of GPUs, one per rank; one GPU is strategy `single`, otherwise `fsdp2`.
    """
    config, model = _model(name, nbits, group_size)
    strategy = "fsdp2" if gpus > 1 else "single"
    needs = estimate(config, model, dtype=torch.bfloat16, world_size=gpus, strategy=strategy,
                     on_gpu=True).device  # fmt: skip
    sizes = estimate(config, model, dtype=torch.bfloat16, on_gpu=True).device
    weights = sum(m.out_features * m.in_features
                  for m in model.modules() if isinstance(m, HQQLinear))  # fmt: skip
    packed, trained = sizes["packed weights"], sizes["adapter and optimizer"] / 3
    # A rank receives the shares of all others. Packed layers are gathered twice, in forward and
    # backward, and embeddings and head once. Summing the adapters' gradients moves them twice.
    others = (gpus - 1) / gpus
    received = others * (2 * packed + sizes["dense weights"] + 2 * trained)
    # A step computes forward, recomputed forward and gradient; flops_per_token has the first and
    # the last. Each of the three dequantizes every weight: it reads the packed one and writes bf16.
    products = 1.5 * flops_per_token(model) * TOKENS / (card.products * EFFICIENCY)
    unpacking = 3 * (2 * weights + packed) / (card.copy * UNPACKING)
    return Prediction(sum(needs.values()) / GIB, received / GIB, products + unpacking,
                      received / card.link(gpus))  # fmt: skip


@functools.cache
def _model(name: str, nbits: int, group_size: int) -> tuple[RunConfig, nn.Module]:
    """Return the configuration and the quantized model with adapters, on meta."""
    config = RunConfig()
    config.quant.nbits, config.quant.group_size = nbits, group_size
    config.adapter.r, config.adapter.dtype = 16, "bf16"
    config.optim.name, config.eval.source = "adamw_8bit", None
    config.parallel.offload, config.model.source = "activations", "synthetic"
    config.train.max_seq_len = TOKENS
    folder = shipped_folder(name)
    assert folder is not None, name
    model = build_meta(config_of(folder), torch.bfloat16)
    quantize_model(model, config.quant)
    model = get_peft_model(
        base_model(model), lora_config(config.adapter, model), low_cpu_mem_usage=True
    )
    cast_adapters(model, torch.bfloat16)
    return config, model


def page() -> str:
    """Return the text of docs/scaling.md."""
    checks = [_checked(each) for each in (FITTED_TO, *OTHERS)]
    head = (
        "model",
        "nbits",
        "GPUs",
        "GiB per GPU",
        "GiB received",
        "work, s",
        "wire, s",
        "tokens/s",
    )
    return TEXT.format(
        checks=tabulate(checks, CHECKED, tablefmt="github"),
        table=tabulate(list(_rows()), head, tablefmt="github", disable_numparse=True),
    )


def _checked(each: Measured) -> tuple:
    """Return a row that compares a measurement with its prediction."""
    found = predict(each.model, each.nbits, each.group_size, each.card, each.gpus)
    gpus = f"{each.gpus} x {each.card.name}"
    return (
        each.model, gpus, f"{each.seconds:.2f}", f"{found.seconds:.2f}",
        f"{found.seconds / each.seconds - 1:+.0%}", f"{each.gib:.1f}", f"{found.gib:.1f}",
        f"{found.gib / each.gib - 1:+.0%}", "fitted" if each is FITTED_TO else "",
    )  # fmt: skip


def _rows() -> Iterator[tuple]:
    """Yield a row of predictions for every model, number of bits and number of GPUs."""
    for name in ("Meta-Llama-3-8B", "Meta-Llama-3-70B", "Llama-3.1-405B"):
        for nbits in (4, 2, 1):
            for gpus in (1, 8, 64, 1024):
                found = predict(name, nbits, 64, H100, gpus)
                rate = gpus * TOKENS / found.seconds
                fits = "" if found.gib < 76 else " (does not fit 80)"
                yield (name, nbits, gpus, f"{found.gib:.1f}{fits}", f"{found.received_gib:.1f}",
                       f"{found.work:.2f}", f"{found.wire:.2f}", f"{rate:,.0f}")  # fmt: skip


CHECKED = (
    "model, 2 bits", "GPUs", "s per step", "predicted", "error", "GiB", "predicted", "error", "",
)  # fmt: skip
TEXT = """# Scaling: a prediction

`python scripts/scaling.py --write` writes this page. The script is the model, and its docstrings
state the assumptions: FSDP2 on H100s, 8 per node (NVLink within a node, 400 Gbit/s per GPU between
nodes), one sequence of 2,048 tokens per GPU and step, groups of 64, LoRA with r=16 in bf16 on all
linear layers, 8-bit AdamW, and activation checkpointing with offloaded layer inputs. **Nothing was
measured on more than two GPUs.**

## Comparison with measurements

{checks}

The efficiency of matrix products (0.66) is fitted to the first row; the other rows are predictions.
Their errors show how far to trust the table below. Between two GPUs of a node, communication is
hidden behind computation. No measurement checks the communication between nodes.

## Predictions

"Work" is computation and "wire" is communication, in seconds per step.

{table}

Gathering packed weights instead of bf16 weights reduces the communication of the linear layers by a
factor of 3.6 (4 bits) to 11 (1 bit). Between nodes, a small batch still waits for this
communication, most of all at 4 bits. A larger batch per GPU hides it, because computation grows
with the number of tokens and communication does not. With sharding within a node and replication
between nodes (`parallel.hsdp=true`, not in the table), only the gradients of the adapters use the
slow links, at the price that the base is sharded over 8 GPUs only.
"""


def main() -> None:
    """Print the page, or write it to docs/scaling.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    if parser.parse_args().write:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page())


if __name__ == "__main__":
    main()
