"""Predict memory, traffic and time of FSDP2 training with HQQ, and write docs/scaling.md.

    python scripts/scaling.py --write

No machine of this project has more than two GPUs. The prediction is arithmetic over shapes, with
one number that is fitted to one measurement (`FITTED_TO`). The other measurements (`OTHERS`) show
how far to trust it. The memory is that of `hqqtrain.loading.memory_estimate`, the estimate that
every run prints.
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
from hqqtrain.training.metrics import flops_per_token

GIB = 2**30
TOKENS = 2048
"""Tokens of a GPU in a step: one sequence."""
GPUS_PER_NODE = 8
USABLE_GIB = 76
"""GiB of an 80 GB GPU that a prediction may reach and still fit; the rest is a margin."""
PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"


@dataclass(frozen=True)
class Card:
    """A GPU and its links. A link is assumed to reach 0.7 of its data sheet.

    Attributes:
        name: Name of the GPU.
        flops: FLOP/s of a matrix product, measured by kernels/bench.
        copy_bandwidth: Bytes/s of a copy, measured by kernels/bench.
        node_bandwidth: Bytes/s that a GPU sends and receives within a node.
        network_bandwidth: Bytes/s that a GPU sends and receives between nodes.
    """

    name: str
    flops: float
    copy_bandwidth: float
    node_bandwidth: float = 0.7 * 450e9
    network_bandwidth: float = 0.7 * 50e9

    def gather_bandwidth(self, gpus: int) -> float:
        """Return the bytes/s of an all-gather over `gpus` GPUs: those of the slowest link."""
        return self.node_bandwidth if gpus <= GPUS_PER_NODE else self.network_bandwidth


H100 = Card("H100", 660e12, 2.95e12)
H200 = Card("H200", 780e12, 4.2e12)


@dataclass(frozen=True)
class Measured:
    """A measured training step: kernels/bench/results/*-large-models.csv.

    Attributes:
        model: Name of the shipped model configuration.
        nbits: Bits of a code.
        group_size: Weights of a group.
        card: The GPU.
        seconds: Time of the step.
        gib: Peak memory of a GPU.
        gpus: Number of GPUs. Each gets TOKENS tokens.
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

PRODUCT_EFFICIENCY = 0.66
"""FLOP/s of the products of whole layers, as a share of `Card.flops`. Fitted to `FITTED_TO`."""
DEQUANTIZE_EFFICIENCY = 0.94
"""Bytes/s of dequantizing, as a share of `Card.copy_bandwidth`. Measured by kernels/bench."""


@dataclass(frozen=True)
class Prediction:
    """The prediction for one rank.

    Attributes:
        gib: Peak memory in GiB.
        received_gib: GiB received in a step.
        work: Seconds of computation in a step.
        wire: Seconds of communication in a step.
    """

    gib: float
    received_gib: float
    work: float
    wire: float

    @property
    def seconds(self) -> float:
        """Seconds of a step: the maximum, because layers are gathered while others compute."""
        return max(self.work, self.wire)


def predict(name: str, nbits: int, group_size: int, card: Card, gpus: int) -> Prediction:
    """Predict a step of TOKENS tokens per rank.

    The assumptions are LoRA with r=16 in bf16 on all linear layers, 8-bit AdamW, activation
    checkpointing with offloaded layer inputs, and a base that is sharded over all `gpus`.

    The work of a step is the forward pass, the recomputed forward pass and the backward pass, each
    of which also dequantizes every weight. `flops_per_token` counts the first and the last.

    The wire carries the packed layers twice (forward and backward), the embeddings and the head
    once, and the gradients of the adapters, counted twice as an all-reduce moves them.
    """
    config, model = _model(name, nbits, group_size)
    workload = workload_of(config, offloads_activations=True)
    single = SingleProcess(SINGLE_PROCESS)
    strategy = FSDP2(SINGLE_PROCESS) if gpus > 1 else single
    memory = estimate_memory(
        workload, model, strategy, dtype=torch.bfloat16, world_size=gpus
    ).device
    sizes = estimate_memory(workload, model, single, dtype=torch.bfloat16).device
    weights = sum(m.out_features * m.in_features
                  for m in model.modules() if isinstance(m, HQQLinear))  # fmt: skip
    # The adapter's bf16 values, its bf16 gradients and the optimizer's two 8-bit moments have the
    # same size: the gradients are a third.
    packed, gradients = sizes["packed weights"], sizes["adapter and optimizer"] / 3
    share_of_others = (gpus - 1) / gpus
    received = share_of_others * (2 * packed + sizes["dense weights"] + 2 * gradients)
    products = 1.5 * flops_per_token(model) * TOKENS / (card.flops * PRODUCT_EFFICIENCY)
    # Dequantizing writes 2 bytes per weight and reads the packed bytes.
    dequantizing = 3 * (2 * weights + packed) / (card.copy_bandwidth * DEQUANTIZE_EFFICIENCY)
    return Prediction(sum(memory.values()) / GIB, received / GIB, products + dequantizing,
                      received / card.gather_bandwidth(gpus))  # fmt: skip


@functools.cache
def _model(name: str, nbits: int, group_size: int) -> tuple[RunConfig, nn.Module]:
    config = RunConfig()
    config.quant.nbits, config.quant.group_size = nbits, group_size
    config.adapter.r, config.adapter.dtype = 16, "bf16"
    config.optim.name, config.eval.source = "adamw_8bit", None
    config.train.activation_checkpointing, config.model.source = "offload", "synthetic"
    config.train.max_seq_len = TOKENS
    folder = shipped_folder(name)
    assert folder is not None, name
    base = build_meta(load_hf_config(folder), torch.bfloat16)
    quantize_model(base, config.quant)
    model = get_peft_model(
        base_model(base), lora_config(config.adapter, base), low_cpu_mem_usage=True
    )
    cast_adapters(model, torch.bfloat16)
    return config, model


def page() -> str:
    """Return the text of docs/scaling.md."""
    checks = [_comparison_row(each) for each in (FITTED_TO, *OTHERS)]
    headers = (
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
        checks=tabulate(checks, COMPARISON_HEADERS, tablefmt="github"),
        table=tabulate(list(_prediction_rows()), headers, tablefmt="github", disable_numparse=True),
    )


def _comparison_row(step: Measured) -> tuple:
    predicted = predict(step.model, step.nbits, step.group_size, step.card, step.gpus)
    gpus = f"{step.gpus} x {step.card.name}"
    return (
        step.model, gpus, f"{step.seconds:.2f}", f"{predicted.seconds:.2f}",
        f"{predicted.seconds / step.seconds - 1:+.0%}", f"{step.gib:.1f}", f"{predicted.gib:.1f}",
        f"{predicted.gib / step.gib - 1:+.0%}", "fitted" if step is FITTED_TO else "",
    )  # fmt: skip


def _prediction_rows() -> Iterator[tuple]:
    for name in ("Meta-Llama-3-8B", "Meta-Llama-3-70B", "Llama-3.1-405B"):
        for nbits in (4, 2, 1):
            for gpus in (1, 8, 64, 1024):
                step = predict(name, nbits, 64, H100, gpus)
                tokens_per_second = gpus * TOKENS / step.seconds
                remark = "" if step.gib < USABLE_GIB else " (does not fit 80)"
                yield (
                    name, nbits, gpus, f"{step.gib:.1f}{remark}", f"{step.received_gib:.1f}",
                    f"{step.work:.2f}", f"{step.wire:.2f}", f"{tokens_per_second:,.0f}",
                )  # fmt: skip


COMPARISON_HEADERS = (
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
    """Print the page, or write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    if parser.parse_args().write:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page())


if __name__ == "__main__":
    main()
