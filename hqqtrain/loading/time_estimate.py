"""Estimate the time of a training step from shapes alone.

On a GPU, a step is the longest of three things: its work, the launches of its kernels, and its
communication. The work is matrix products, attention, and the bytes that all other kernels read and
write. Rates are shares of the data sheet; each was measured once, on one H200.
"""

from dataclasses import dataclass

import torch
from torch import nn

from hqqtrain.common.gpus import Gpu
from hqqtrain.distributed.strategies.base import Strategy
from hqqtrain.loading.activation_memory import LayerWidths
from hqqtrain.loading.memory_estimate import MemoryEstimate, ModelSizes
from hqqtrain.loading.workload import Workload
from hqqtrain.models.families.structure import output_head, text_config
from hqqtrain.models.fqn import original_module
from hqqtrain.nn.base_linears import base_linears
from hqqtrain.nn.hqq_linear import HQQLinear

PRODUCT_RATE = 0.73
"""FLOP/s of the frozen weights' products. 8B shape, 4 x 2048 tokens: 369 TFLOP in 509 ms with
recomputation, and 254 in 352 ms without; commit 9747aad, torch 2.11, 2026-11-29."""

ATTENTION_RATE, ATTENTION_RAMP = 0.264, 300
"""FLOP/s of causal attention on long sequences, and the length at which it has half of that rate.
The same steps have 0.23 at 2,048 tokens: 19.8 TFLOP in 88 ms, and 15.4 in 67 ms. The ramp is that
of FlashAttention-2 in the figures of the paper on FlashAttention-3 (H100, 512 to 16,384 tokens)."""

MEMORY_RATE = 0.80
"""Bytes/s of other kernels. A copy reaches 4.28 of 4.8 TB/s, and dequantization 0.9 of a copy."""

PLAIN_TRAFFIC = 5.4
"""Bytes of these kernels with `train.fused=false`, relative to those with fused blocks. The step of
commit 110084e took 1,096 ms, 475 of them in such kernels; the formula for fused blocks has 88."""

LOGIT_BYTES = {True: 8, False: 37}
"""Bytes read and written for a logit by the loss, fused or not: four passes in bf16, and 10 ms for
8,192 x 128,256 logits."""

LAUNCH_SECONDS = 49e-6
"""Seconds of the host for a kernel: 8,554 launches of a step of 1 x 2048 tokens took 418 ms."""

LAUNCHES = {True: (40, 36, 60), False: (73, 73, 121)}
"""Kernels of a layer in the forward pass, its recomputation and the backward pass. Without fused
blocks the sum is 8,554 / 32, measured; the others are counted by hand, not measured."""

LINK_RATE, NETWORK_BANDWIDTH, GPUS_PER_NODE = 0.7, 50e9, 8
"""Share of a link that an all-gather reaches, bytes/s of a GPU between nodes, and GPUs of a node.
They are assumptions, as in docs/scaling.md."""

HOST_BANDWIDTH = 20e9
"""Bytes/s of a copy from pinned host memory to a GPU; an assumption, for PCIe 4."""


@dataclass(frozen=True)
class TimeEstimate:
    """Estimated time of an optimizer step on all GPUs.

    Attributes:
        parts: Seconds of the work of a rank, by kind. They add up.
        launches: Seconds of the host to launch the kernels, at the same time as the work.
        communication: Seconds in which parameters and gradients travel, at the same time.
        tokens: Tokens of the step, of all ranks.
    """

    parts: dict[str, float]
    launches: float
    communication: float
    tokens: int

    @property
    def work(self) -> float:
        """Seconds of the work of a rank."""
        return sum(self.parts.values())

    @property
    def seconds(self) -> float:
        """Seconds of the step."""
        return max(self.work, self.launches, self.communication)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def limit(self) -> str:
        """Name of the part that takes longest."""
        limits = self.parts | {"launches": self.launches, "communication": self.communication}
        others = max(self.launches, self.communication)
        return max(self.parts if self.work >= others else limits, key=lambda name: limits[name])


def estimate_time(
    workload: Workload, model: nn.Module, strategy: Strategy, memory: MemoryEstimate, gpu: Gpu, *,
    dtype: torch.dtype, world_size: int,
) -> TimeEstimate | None:  # fmt: skip
    """Estimate an optimizer step; None if the speed of `gpu` is unknown.

    Args:
        workload: The settings of the run.
        model: The model on meta, with its adapters.
        strategy: Decides what the ranks send.
        memory: The estimate for the same settings.
        gpu: The GPU of each rank.
        dtype: Dtype of products and activations.
        world_size: Number of ranks.
    """
    if gpu.flops is None or gpu.bandwidth is None:
        return None
    cost = _Cost.of(workload, model, dtype)
    rounds = -(-workload.global_batch_size // (world_size * workload.micro_batch_size))
    tokens = workload.global_batch_size * workload.max_seq_len
    own_tokens = tokens / world_size
    bandwidth = gpu.bandwidth * MEMORY_RATE
    trained = memory.device["adapter and optimizer"]
    length = workload.max_seq_len
    attention_rate = ATTENTION_RATE * length / (length + ATTENTION_RAMP)
    parts = {
        "products": own_tokens * cost.products / (gpu.flops * PRODUCT_RATE),
        "attention": own_tokens * cost.attention / (gpu.flops * attention_rate),
        "other kernels": own_tokens * cost.traffic / bandwidth,
        "dequantization": rounds * cost.dequantization / bandwidth,
        "optimizer": 2 * trained / bandwidth,
    }
    sizes = ModelSizes.of(model, dtype)
    sent = _sent_bytes(strategy, sizes, memory, rounds, world_size)
    between = gpu.link if world_size <= GPUS_PER_NODE else NETWORK_BANDWIDTH
    communication = sent / (between * LINK_RATE)
    communication += _fetched_bytes(strategy, sizes, rounds, world_size) / HOST_BANDWIDTH
    return TimeEstimate(parts, rounds * cost.launches * LAUNCH_SECONDS, communication, tokens)


@dataclass(frozen=True)
class _Cost:
    """Work of a micro-batch.

    Attributes:
        products: FLOPs per token of products with weights.
        attention: FLOPs per token of attention.
        traffic: Bytes per token of elementwise kernels, of the adapters' products and of the loss.
        dequantization: Bytes of dequantization.
        launches: Number of kernels.
    """

    products: float
    attention: float
    traffic: float
    dequantization: float
    launches: int

    @classmethod
    def of(cls, workload: Workload, model: nn.Module, dtype: torch.dtype) -> "_Cost":
        """Count the work of `model`."""
        config, widths = text_config(model), LayerWidths.of(model)
        depth, fused = config.num_hidden_layers, workload.is_fused and widths.is_known
        share = workload.recomputed_layers(depth) / max(1, depth)  # of layers that recompute
        # A fused layer does not recompute its last product.
        skipped = widths.inner * widths.hidden if fused else 0
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        head = original_module(output_head(model))
        logits = getattr(head, "out_features", config.vocab_size)
        head_weights = logits * widths.hidden
        products = depth * (4 * widths.weights + 2 * share * (widths.weights - skipped))
        products += (4 if fused else 6) * head_weights + (6 + 2 * share) * trained
        forward, recomputed, backward = _traffic(widths)
        traffic = forward + share * recomputed + backward
        launches = LAUNCHES[fused][0] + share * LAUNCHES[fused][1] + LAUNCHES[fused][2]
        # A fused layer dequantizes those of its attention once more if it recomputes.
        mlp = widths.hidden * (widths.gate_up + widths.inner)
        passes = 2 + share * (1 - mlp / widths.weights if fused else 1)
        heads = widths.attention or widths.hidden
        return cls(
            products=products,
            attention=depth * (3.5 + share) * 2 * workload.max_seq_len * heads,
            traffic=dtype.itemsize * depth * traffic * (1 if fused else PLAIN_TRAFFIC)
            + logits * LOGIT_BYTES[fused],
            dequantization=passes * _dequantized_bytes(model, dtype),
            launches=int(depth * launches),
        )


def _traffic(widths: LayerWidths) -> tuple[int, int, int]:
    """Return elements per token that a fused layer reads and writes beside the frozen products.

    They are those of the forward pass, of its recomputation and of the backward pass. The forward
    pass has two norms, one of which also adds to the residual stream, a copy of the stream to which
    a product adds the MLP's output, the rotation, the gated activation, the projections A x, and
    outputs that are written once more because B A x is added to them. The backward pass has the
    gradients of all these, and of A and B.
    """
    hidden, inner, gate_up = widths.hidden, widths.inner, widths.gate_up
    if widths.is_known:
        inputs = 2 * hidden + widths.attention + inner
        outputs = 2 * hidden + widths.qkv + gate_up
    else:
        inputs = outputs = widths.linears // 2
    forward = 8 * hidden + 2 * widths.rotated + gate_up + inner + inputs + 2 * outputs
    recomputed = forward - gate_up - 2 * inner - 4 * hidden
    backward = 8 * hidden + 2 * widths.rotated + 2 * (inner + gate_up) + inner
    backward += 3 * inputs + 2 * outputs + 2 * widths.qkv
    return forward, recomputed, backward


def _dequantized_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Return the bytes that dequantizing all weights once reads and writes."""
    total = 0
    for layer in base_linears(model).values():
        if isinstance(layer, HQQLinear):
            total += layer.out_features * layer.in_features * dtype.itemsize
            total += sum(p.nbytes for p in (layer.W_q, layer.scale, layer.zero))
    return total


def _sent_bytes(
    strategy: Strategy, sizes: ModelSizes, memory: MemoryEstimate, rounds: int, world_size: int
) -> float:
    """Return the bytes that a rank receives in a step.

    Shards of layers are gathered twice in each micro-batch, other parameters once. Gradients of
    adapters travel twice, as in an all-reduce.
    """
    if world_size == 1:
        return 0.0
    shards = strategy.parameter_shards(world_size)
    gathered = 2 * rounds * sizes.packed + sizes.dense
    gradients = memory.split["adapter and optimizer"].get("gradients", 0)
    gradients *= strategy.adapter_shards(world_size)
    return gathered * (shards - 1) / shards + 2 * gradients


def _fetched_bytes(strategy: Strategy, sizes: ModelSizes, rounds: int, world_size: int) -> float:
    """Return the bytes of parameters that a rank copies from host memory in a step."""
    if strategy.offloads_parameters:
        return 2 * rounds * sizes.packed / strategy.parameter_shards(world_size)
    return 2 * rounds * sizes.meta if strategy.offloads_meta else 0.0
