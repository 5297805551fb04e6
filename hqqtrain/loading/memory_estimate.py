"""Estimate the memory and disk of a run from shapes alone, before any weight is read.

Weights, gradients and optimizer state are exact; activations follow the formula in
`activation_bytes`. `memory_check` compares the estimate with what is available.
"""

from dataclasses import dataclass, field

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import nn

from hqqtrain.common.text import short
from hqqtrain.config.activation_checkpointing import count_recomputed
from hqqtrain.distributed.strategies.base import Strategy
from hqqtrain.loading.calibrated_load import calibration_bytes
from hqqtrain.loading.reference_memory import reference_bytes
from hqqtrain.loading.workload import Workload
from hqqtrain.models.causal_lm import (
    MAX_EVALUATION_TOKENS,
    MAX_TRAINING_LOGITS,
)
from hqqtrain.models.families.structure import find_decoder_layers, text_config
from hqqtrain.models.fqn import base_model, expected_shapes, is_adapter
from hqqtrain.nn.base_linears import linear_shapes
from hqqtrain.nn.hqq_linear import PACKED_PARAMETERS, HQQLinear

GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimated bytes of a run.

    Attributes:
        device: Bytes on the device of one rank, by purpose such as "packed weights".
        disk: Bytes in the run's directory, by purpose.
        host: Bytes of one rank in the host's memory, offloaded or kept there beside a GPU.
        calibration: Bytes on the device of one rank while it is calibrated, with the weights.
    """

    device: dict[str, int] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)
    host: int = 0
    calibration: int = 0

    def __str__(self) -> str:
        parts = ", ".join(f"{k} {short(v / GIB)}" for k, v in self.device.items() if v)
        memory, disk = sum(self.device.values()) / GIB, sum(self.disk.values()) / GIB
        calibrating = f", {short(self.calibration / GIB)} GiB to calibrate" * (self.calibration > 0)
        hosted = f", host memory {short(self.host / GIB)} GiB" * (self.host > 0)
        return (
            f"memory per rank {short(memory)} GiB ({parts}){calibrating}{hosted}, "
            f"disk {short(disk)} GiB"
        )


def estimate_memory(
    workload: Workload,
    model: nn.Module,
    strategy: Strategy,
    *,
    dtype: torch.dtype,
    world_size: int | None = None,
) -> MemoryEstimate:
    """Estimate the memory of one rank and the disk of the run.

    Args:
        workload: The settings of the run.
        model: Model on meta, with its base linears in place and adapters injected.
        strategy: Decides which parameters are sharded, and gathered or offloaded.
        dtype: Dtype of activations and unquantized weights.
        world_size: Number of ranks; by default those of `strategy`.
    """
    sizes = _Sizes.of(model, dtype)
    world_size = strategy.comm.size if world_size is None else world_size
    shards = strategy.parameter_shards(world_size)
    adapters = _adapter_bytes(workload, sizes) // strategy.adapter_shards(world_size)
    reference = reference_bytes(
        workload.reference,
        model,
        strategy,
        tokens=workload.eval_tokens,
        sequence_tokens=max(workload.max_seq_len, workload.eval_context),
        dtype=dtype,
        world_size=world_size,
    )
    parameters = {
        "packed weights": sizes.packed // shards,
        "dense weights": sizes.dense // shards,
        "adapter and optimizer": adapters if workload.trains else 0,
        "reference model": reference.whole,
    }
    root, layers = sizes.root, sizes.packed + sizes.dense - sizes.root
    gathered = strategy.gathered_bytes(
        world_size, root=root, layers=layers, itemsize=dtype.itemsize
    )
    working = max(_working_bytes(workload, sizes, shards, dtype), reference.layer)
    working += gathered + (_token_bytes(model, dtype) if workload.trains else 0)
    if strategy.offloads_parameters and strategy.shards_parameters:
        # The GPU keeps only what is gathered.
        host, parameters = sum(parameters.values()), dict.fromkeys(parameters, 0)
    else:
        hosted = _Hosted.of(model, strategy, dtype)
        host, working = hosted.packed + hosted.dense, working + hosted.buffers
        parameters["packed weights"] -= hosted.packed
        parameters["dense weights"] -= hosted.dense
        if strategy.offloads_parameters:
            host, parameters["reference model"] = host + parameters["reference model"], 0
    parameters["reference model"] += reference.outside
    on_host = strategy.comm.device.type == "cpu"
    host += 0 if on_host else reference.outputs
    device = parameters | {
        "activations": activation_bytes(workload, model, dtype) if workload.trains else 0,
        "logits": _logit_bytes(workload, model, dtype, in_chunks=strategy.may_call_head_alone),
        "working memory": working,
        "outputs of the reference model": reference.outputs if on_host else 0,
    }
    text = workload.calibration_tokens
    calibration = calibration_bytes(model, text, dtype, world_size=world_size)
    if calibration:  # before the model is trained
        calibration += parameters["packed weights"] + parameters["dense weights"]
    return MemoryEstimate(device, _disk_bytes(workload, sizes, dtype), host, calibration)


@dataclass(frozen=True)
class _Sizes:
    """Sizes of the whole, unsharded model."""

    packed: int
    """Bytes of the packed weights."""
    dense: int
    """Bytes of the base parameters that are not quantized."""
    adapter: int
    """Elements of the adapters."""
    root: int
    """Bytes of the dense parameters outside of the decoder layers."""
    source: int
    """Elements of the full-precision model."""
    largest: int
    """Elements of the largest quantized linear."""

    @classmethod
    def of(cls, model: nn.Module, dtype: torch.dtype) -> "_Sizes":
        """Count the parameters of `model`; `dtype` is that of dense parameters."""
        packed = dense = adapter = root = 0
        layers = find_decoder_layers(model)
        in_layers = set() if layers is None else set(layers.parameters())
        for name, param in model.named_parameters():
            if is_adapter(name):
                adapter += param.numel()
            elif name.rpartition(".")[2] in PACKED_PARAMETERS:
                packed += param.numel() * param.element_size()
            else:
                dense += param.numel() * dtype.itemsize
                if param not in in_layers:
                    root += param.numel() * dtype.itemsize
        source = sum(torch.Size(shape).numel() for shape in expected_shapes(model).values())
        layouts = [m.layout for m in model.modules() if isinstance(m, HQQLinear)]
        largest = max((x.out_features * x.in_features for x in layouts), default=0)
        return cls(packed, dense, adapter, root, source, largest)


@dataclass(frozen=True)
class _Hosted:
    """Bytes that a strategy that does not shard keeps in host memory."""

    packed: int
    """Bytes of the packed weights."""
    dense: int
    """Bytes of the base parameters that are not quantized."""
    buffers: int
    """On the device, for the two groups of parameters that it has at a time."""

    @classmethod
    def of(cls, model: nn.Module, strategy: Strategy, dtype: torch.dtype) -> "_Hosted":
        """Count the parameters of `model`; `dtype` is that of dense parameters."""
        on_host = set(strategy.host_parameters(model))
        layers = find_decoder_layers(model) or ()
        groups = {
            param: number for number, layer in enumerate(layers) for param in layer.parameters()
        }
        packed, dense, by_group = 0, 0, dict[int, int]()
        for name, param in model.named_parameters():
            if param not in on_host:
                continue
            is_packed = name.rpartition(".")[2] in PACKED_PARAMETERS
            size = param.numel() * (param.element_size() if is_packed else dtype.itemsize)
            packed, dense = packed + is_packed * size, dense + (not is_packed) * size
            group = groups.get(param, -1)
            by_group[group] = by_group.get(group, 0) + size
        return cls(packed, dense, 2 * max(by_group.values(), default=0))


def _adapter_bytes(workload: Workload, sizes: _Sizes) -> int:
    """Return the bytes of adapters, their gradients and AdamW's two moments.

    torch keeps the moments in the adapters' dtype, bitsandbytes in 8 or 32 bits.
    """
    itemsize = workload.adapter_itemsize
    moments = {"adamw": 2 * itemsize, "paged_adamw": 8}.get(workload.optimizer, 2)
    return sizes.adapter * (2 * itemsize + moments)


def activation_bytes(workload: Workload, model: nn.Module, dtype: torch.dtype) -> int:
    """Return the bytes that autograd saves for a micro-batch.

    A decoder layer saves, per token, the input and the output of each of its linears (the operands
    of adapters, attention and MLP), and two fp32 copies of the residual stream for its norms. With
    activation checkpointing, the layers that recompute keep the residual stream before them, or two
    of them at a time if it is offloaded. If all layers recompute, one of them at a time keeps all
    that it saves.
    """
    config, tokens = text_config(model), workload.tokens
    num_layers, hidden_size = config.num_hidden_layers, config.hidden_size
    total_width = sum(map(sum, linear_shapes(base_model(model)).values()))
    layer_width = total_width * dtype.itemsize // max(1, num_layers)  # bytes per token
    layer_bytes = tokens * (layer_width + 2 * 4 * hidden_size)
    recomputed = count_recomputed(workload.activation_checkpointing, num_layers)
    num_inputs = min(2, recomputed) if workload.offloads_activations else recomputed
    inputs = num_inputs * tokens * hidden_size * dtype.itemsize
    return inputs + max(1, num_layers - recomputed) * layer_bytes


def _logit_bytes(
    workload: Workload, model: nn.Module, dtype: torch.dtype, *, in_chunks: bool
) -> int:
    """Return the bytes of logits, and of what the loss derives from them.

    Training computes at most `MAX_TRAINING_LOGITS` logits at a time, or all of them without
    `in_chunks`: the logits and their gradient in `dtype`, and in fp32 a copy, its softmax and its
    gradient. Evaluation keeps the logits of two models, and four fp32 tensors of a chunk of tokens.
    """
    vocab_size, tokens = text_config(model).vocab_size, workload.tokens
    eval_tokens = max(tokens, workload.eval_context)  # a batch has at least one window
    chunk_tokens = min(eval_tokens, MAX_EVALUATION_TOKENS)
    evaluation = vocab_size * (2 * eval_tokens * dtype.itemsize + 4 * 4 * chunk_tokens)
    limit = MAX_TRAINING_LOGITS if in_chunks else vocab_size * tokens
    num_logits = min(vocab_size * tokens, limit)
    training = num_logits * (2 * dtype.itemsize + 3 * 4)
    return max(evaluation if workload.evaluates else 0, training if workload.trains else 0)


def _working_bytes(workload: Workload, sizes: _Sizes, shards: int, dtype: torch.dtype) -> int:
    """Return the bytes to quantize a rank's rows of the largest linear, or to compute with it.

    Quantizing and computing do not happen at the same time, so the larger one counts. Quantizing
    weights that are copied to a GPU needs four copies, one of them in transit; weights generated
    there need two. The codes need 2 more bytes per weight. Computing needs the dequantized weight,
    and its cast for the product.
    """
    copies = 2 if workload.is_synthetic else 4
    quantizing = (copies * dtype.itemsize + 2) * sizes.largest // shards
    return max(quantizing, 2 * dtype.itemsize * sizes.largest)


def _token_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Return the bytes to train rows of embeddings: PEFT copies the whole weight, and its gradient.

    The embeddings and the head do not do so at the same time, so the larger one counts.
    """
    layers = (m.base_layer for m in model.modules() if isinstance(m, TrainableTokensLayer))
    sizes = (sum(param.numel() for param in layer.parameters()) for layer in layers)
    return 2 * dtype.itemsize * max(sizes, default=0)


def _disk_bytes(workload: Workload, sizes: _Sizes, dtype: torch.dtype) -> dict[str, int]:
    """Return the bytes that the run's directory will grow by.

    A checkpoint contains the adapter and its two moments. An export is as large as quantized/,
    unless it is dense. GGUF takes at most 8.5 bits a weight.
    """
    packed, dense = sizes.packed + sizes.dense, sizes.source * dtype.itemsize
    export = {"dense": dense, "gguf": sizes.source * 17 // 16}.get(workload.export_format, packed)
    adapter = workload.adapter_itemsize * sizes.adapter if workload.trains else 0
    return {
        "quantized/": packed if workload.saves_quantized else 0,
        "adapter/": adapter,
        "checkpoints/": workload.new_checkpoints * 3 * adapter,
        "export": export if workload.task == "export" else 0,
    }
