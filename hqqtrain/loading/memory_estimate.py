"""How much memory and disk a run will need, from shapes alone, before any weight is read.

An estimate, said to be one: weights, gradients and optimizer state are exact; activations
follow the formula of `_activations`. `fits.py` says what follows from it.
"""

from dataclasses import dataclass, field

import torch
from torch import nn

from hqqtrain.config.run import RunConfig
from hqqtrain.models.fqn import base_model, expected_shapes, is_adapter
from hqqtrain.nn.hqq_linear import PACKED_PARAMETERS, HQQLinear

GIB = 2**30

LOGIT_SLICE = 2048
"""Tokens whose logits an evaluation holds in fp32 at a time."""

TRAINED_LOGITS = 1 << 24
"""Logits that the training's loss holds at a time."""

ZERO3_LIVE, ZERO3_BUCKET = 1 << 28, 1 << 24
"""As `dist.zero3` tells DeepSpeed: numbers that are whole, and gradients, at a time."""

SHARDING = ("fsdp2", "fsdp1", "zero3")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by what they are for: of one rank's device, of what it offloads to the host, and of the
    run's directory on disk."""

    device: dict[str, int] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)
    host: int = 0

    def __str__(self) -> str:
        parts = (f"{k} {v / GIB:.2f}" for k, v in self.device.items() if v)
        memory, disk = sum(self.device.values()) / GIB, sum(self.disk.values()) / GIB
        return f"memory a rank {memory:.2f} GiB ({', '.join(parts)}), disk {disk:.2f} GiB"


def estimate_memory(config: RunConfig, model: nn.Module, *, dtype: torch.dtype, world_size: int = 1,
             strategy: str = "single", on_gpu: bool = False, has_quantized: bool = False,
             has_checkpoints: bool = False) -> MemoryEstimate:  # fmt: skip
    """The needs of one rank, from `model` on meta: HQQLinears in place, adapters injected.

    `dtype`: of activations and unquantized weights. Sharded, parameters, gradients and optimizer
    state are divided by `world_size` (under `fsdp1` not the adapters'). What lies outside of
    layers, as embeddings do, FSDP keeps whole from the first step on, and FSDP2 gathers it through
    a buffer of that size. `on_gpu`: what `parallel.offload` says is in the host's memory instead.
    `has_...`: the run's directory holds them already, and needs no room for them.
    """
    sizes, parallel = _Sizes.of(model, dtype), config.parallel
    shards = world_size if strategy in SHARDING else 1
    trained_shards = 1 if strategy == "fsdp1" else shards
    finetune, measures = config.task == "finetune", config.eval.source is not None
    tokens = config.train.micro_batch_size * config.train.max_seq_len
    kept = not (on_gpu and parallel.offloads_activations)
    parameters = {
        "packed weights": sizes.packed // shards,
        "dense weights": sizes.dense // shards,
        "adapter and optimizer": _trained(config, sizes) // trained_shards if finetune else 0,
        "reference model": _reference(config, sizes, dtype) // shards if measures else 0,
    }
    gathered, host = sizes.root * (shards - 1) // shards, 0
    if strategy == "fsdp2" and shards > 1:
        gathered += sizes.root
    if strategy == "zero3":
        gathered += min(ZERO3_LIVE * dtype.itemsize, sizes.packed) + ZERO3_BUCKET * 4
    if on_gpu and parallel.offloads_parameters:
        gathered, host = 2 * sizes.root, sum(parameters.values())
        parameters = dict.fromkeys(parameters, 0)
    device = parameters | {
        "activations": _activations(config, model, dtype, tokens, kept) if finetune else 0,
        "logits": _logits(model, dtype, tokens, finetune, measures, whole=strategy == "zero3"),
        "working memory": _working(config, sizes, shards, dtype) + gathered,
    }
    return MemoryEstimate(device, _disk(config, sizes, dtype, has_quantized, has_checkpoints), host)


@dataclass(frozen=True)
class _Sizes:
    """Bytes (and, of adapters, numbers) over the whole model."""

    packed: int
    dense: int
    adapter: int
    root: int
    """Bytes of what lies outside of the decoder layers."""
    source: int
    """Weights of the full-precision model, a number."""
    largest: int
    """Weights of the largest quantized linear."""

    @classmethod
    def of(cls, model: nn.Module, dtype: torch.dtype) -> "_Sizes":
        packed = dense = adapter = root = 0
        for name, param in model.named_parameters():
            if is_adapter(name):
                adapter += param.numel()
            elif name.rpartition(".")[2] in PACKED_PARAMETERS:
                packed += param.numel() * param.element_size()
            else:
                dense += param.numel() * dtype.itemsize
                if not any(part.isdigit() for part in name.split(".")):
                    root += param.numel() * dtype.itemsize
        shapes = expected_shapes(model).values()
        linears = [m.layout for m in model.modules() if isinstance(m, HQQLinear)]
        largest = max((a.out_features * a.in_features for a in linears), default=0)
        return cls(packed, dense, adapter, root, sum(map(_count, shapes)), largest)


def _trained(config: RunConfig, sizes: _Sizes) -> int:
    """Adapters, gradients and AdamW's two moments: torch's in the adapters' dtype, bitsandbytes'
    in 8 or 32 bits."""
    number = _adapter_bytes(config)
    moments = {"adamw": 2 * number, "paged_adamw": 8}.get(config.optim.name, 2)
    return sizes.adapter * (2 * number + moments)


def _adapter_bytes(config: RunConfig) -> int:
    return 2 if config.adapter.dtype == "bf16" else 4


def _reference(config: RunConfig, sizes: _Sizes, dtype: torch.dtype) -> int:
    return sizes.source * dtype.itemsize if config.eval.reference == "resident" else 0


def _activations(
    config: RunConfig, model: nn.Module, dtype: torch.dtype, tokens: int, kept: bool
) -> int:
    """Bytes that the backward pass needs of `tokens` tokens.

    A decoder layer keeps, per token, input and output of each of its linears (the adapters',
    the attention's and the MLP's operands) and two fp32 copies of the stream for its norms.
    With checkpointing: the stream before each layer, if it is `kept` here, and one layer in full.
    """
    hf = base_model(model).config.get_text_config()
    layers, hidden = hf.num_hidden_layers, hf.hidden_size
    linears = [m.layout for m in base_model(model).modules() if isinstance(m, HQQLinear)]
    widths = sum(layout.in_features + layout.out_features for layout in linears)
    layer = tokens * (widths * dtype.itemsize // max(1, layers) + 2 * 4 * hidden)
    if not config.train.activation_checkpointing:
        return layers * layer
    return (layers if kept else 1) * tokens * hidden * dtype.itemsize + layer


def _logits(
    model: nn.Module, dtype: torch.dtype, tokens: int, training: bool, measures: bool,
    whole: bool,
) -> int:  # fmt: skip
    """Training, up to TRAINED_LOGITS unless `whole`: logits and their gradient, and in fp32 a copy,
    its softmax and its gradient. Measuring: two models' logits, and four fp32 tensors of a slice.
    """
    vocabulary = base_model(model).config.get_text_config().vocab_size
    measuring = 2 * tokens * dtype.itemsize + 4 * 4 * min(tokens, LOGIT_SLICE)
    most = vocabulary * tokens
    trained = (most if whole else min(most, TRAINED_LOGITS)) * (2 * dtype.itemsize + 12)
    return max(vocabulary * measuring if measures else 0, trained if training else 0)


def _working(config: RunConfig, sizes: _Sizes, shards: int, dtype: torch.dtype) -> int:
    """Quantizing a rank's share of one linear, or computing with one (dequantized, and cast for the
    product), whichever is more. Of weights that are copied to a GPU four are there at a time, one
    of them on its way; of those made there two; and codes."""
    weights = 2 if config.model.source == "synthetic" else 4
    quantizing = (weights * dtype.itemsize + 2) * sizes.largest // shards
    return max(quantizing, 2 * dtype.itemsize * sizes.largest)


def _disk(
    config: RunConfig, sizes: _Sizes, dtype: torch.dtype, has_quantized: bool, has_checkpoints: bool
) -> dict[str, int]:
    """A checkpoint has the adapter and its two moments; a new one is written beside the others."""
    saves = config.task in ("finetune", "quantize") and config.quant.save and not has_quantized
    adapter = _adapter_bytes(config) * sizes.adapter if config.task == "finetune" else 0
    checkpoints = 1 if has_checkpoints else config.ckpt.keep_last + config.ckpt.keep_best + 1
    return {
        "quantized/": sizes.packed + sizes.dense if saves else 0,
        "adapter/": adapter,
        "checkpoints/": checkpoints * 3 * adapter,
        "export": sizes.source * dtype.itemsize if config.task == "export" else 0,
    }


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
