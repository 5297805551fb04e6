"""Estimate the memory and disk of a run from shapes alone, before any weight is read.

Weights, gradients and optimizer state are exact; activations follow the formula in `_activations`.
`fits.py` compares the estimate with what is available.
"""

from dataclasses import dataclass, field

import torch
from torch import nn

from hqqtrain.config import RunConfig
from hqqtrain.models.names import base_model, expected_shapes, is_adapter
from hqqtrain.nn import PACKED, HQQLinear

GIB = 2**30
LOGIT_SLICE = 2048
"""Tokens whose logits the evaluation converts to fp32 at a time."""
TRAINED_LOGITS = 1 << 24
"""Largest number of logits that the training loss computes at a time."""
ZERO3_LIVE, ZERO3_BUCKET = 1 << 28, 1 << 24
"""Elements that ZeRO-3 gathers at a time, and elements of a gradient bucket; as in `dist.zero3`."""
SHARDING = ("fsdp2", "fsdp1", "zero3")
"""The strategies that shard parameters."""


@dataclass(frozen=True)
class Estimate:
    """Estimated bytes of a run.

    Attributes:
        device: Bytes on the device of one rank, by purpose.
        disk: Bytes in the run's directory, by purpose.
        host: Bytes that one rank offloads to the host's memory.
    """

    device: dict[str, int] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)
    host: int = 0

    def __str__(self) -> str:
        parts = (f"{k} {v / GIB:.2f}" for k, v in self.device.items() if v)
        memory, disk = sum(self.device.values()) / GIB, sum(self.disk.values()) / GIB
        return f"memory per rank {memory:.2f} GiB ({', '.join(parts)}), disk {disk:.2f} GiB"


def estimate(config: RunConfig, model: nn.Module, *, dtype: torch.dtype, world_size: int = 1,
             strategy: str = "single", on_gpu: bool = False, has_quantized: bool = False,
             has_checkpoints: bool = False) -> Estimate:  # fmt: skip
    """Estimate the memory of one rank and the disk of the run.

    Sharding strategies divide parameters, gradients and optimizer state by `world_size`; `fsdp1`
    does not shard those of the adapters. FSDP keeps parameters outside of decoder layers, such as
    embeddings, gathered from the first step on, and FSDP2 gathers them through a buffer of the same
    size.

    Args:
        config: Configuration of the run.
        model: Model on meta, with HQQLinears in place and adapters injected.
        dtype: Dtype of activations and unquantized weights.
        world_size: Number of ranks.
        strategy: Resolved parallel.strategy.
        on_gpu: Whether the device is a GPU, so that parallel.offload moves memory to the host.
        has_quantized: Whether the run's directory already contains quantized/.
        has_checkpoints: Whether the run's directory already contains checkpoints.
    """
    sizes, parallel = _Sizes.of(model, dtype), config.parallel
    shards = world_size if strategy in SHARDING else 1
    trainable_shards = 1 if strategy == "fsdp1" else shards
    finetune, evaluates = config.task == "finetune", config.eval.source is not None
    has_reference = evaluates and config.eval.reference == "resident"
    tokens = config.train.micro_batch_size * config.train.max_seq_len
    kept = not (on_gpu and parallel.offloads_activations)
    parameters = {
        "packed weights": sizes.packed // shards,
        "dense weights": sizes.dense // shards,
        "adapter and optimizer": _trainable(config, sizes) // trainable_shards if finetune else 0,
        "reference model": sizes.source * dtype.itemsize // shards if has_reference else 0,
    }
    # Parameters that are unsharded for a while, in addition to the rank's own shard.
    gathered, host = sizes.root * (shards - 1) // shards, 0
    if strategy == "fsdp2" and shards > 1:
        gathered += sizes.root  # the buffer of the all-gather
    if strategy == "zero3":
        gathered += min(ZERO3_LIVE * dtype.itemsize, sizes.packed) + ZERO3_BUCKET * 4
    # With offloading the GPU keeps only what is gathered, and its buffer.
    if on_gpu and parallel.offloads_parameters:
        gathered, host = 2 * sizes.root, sum(parameters.values())
        parameters = dict.fromkeys(parameters, 0)
    device = parameters | {
        "activations": _activations(config, model, dtype, tokens, kept) if finetune else 0,
        "logits": _logits(model, dtype, tokens, finetune, evaluates, whole=strategy == "zero3"),
        "working memory": _working(config, sizes, shards, dtype) + gathered,
    }
    return Estimate(device, _disk(config, sizes, dtype, has_quantized, has_checkpoints), host)


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
        for name, param in model.named_parameters():
            if is_adapter(name):
                adapter += param.numel()
            elif name.rpartition(".")[2] in PACKED:
                packed += param.numel() * param.element_size()
            else:
                dense += param.numel() * dtype.itemsize
                is_in_layer = any(part.isdigit() for part in name.split("."))
                if not is_in_layer:
                    root += param.numel() * dtype.itemsize
        shapes = expected_shapes(model).values()
        source = sum(torch.Size(shape).numel() for shape in shapes)
        layouts = [m.layout for m in model.modules() if isinstance(m, HQQLinear)]
        largest = max((x.out_features * x.in_features for x in layouts), default=0)
        return cls(packed, dense, adapter, root, source, largest)


def _trainable(config: RunConfig, sizes: _Sizes) -> int:
    """Return the bytes of adapters, their gradients and AdamW's two moments.

    torch keeps the moments in the adapters' dtype, bitsandbytes in 8 or 32 bits.
    """
    itemsize = _adapter_itemsize(config)
    moments = {"adamw": 2 * itemsize, "paged_adamw": 8}.get(config.optim.name, 2)
    return sizes.adapter * (2 * itemsize + moments)


def _adapter_itemsize(config: RunConfig) -> int:
    return 2 if config.adapter.dtype == "bf16" else 4


def _activations(
    config: RunConfig, model: nn.Module, dtype: torch.dtype, tokens: int, kept: bool
) -> int:
    """Return the bytes that autograd saves for `tokens` tokens.

    A decoder layer saves, per token, the input and the output of each of its linears (the operands
    of adapters, attention and MLP), and two fp32 copies of the residual stream for its norms. With
    activation checkpointing, only one layer is there in full; the others keep the residual stream
    before them, if it is `kept` on the device.
    """
    hf = base_model(model).config.get_text_config()
    layers, hidden = hf.num_hidden_layers, hf.hidden_size
    linears = [m.layout for m in base_model(model).modules() if isinstance(m, HQQLinear)]
    widths = sum(layout.in_features + layout.out_features for layout in linears)  # of all layers
    layer = tokens * (widths * dtype.itemsize // max(1, layers) + 2 * 4 * hidden)
    if not config.train.checkpointing:
        return layers * layer
    return (layers if kept else 1) * tokens * hidden * dtype.itemsize + layer


def _logits(
    model: nn.Module, dtype: torch.dtype, tokens: int, trains: bool, evaluates: bool, whole: bool
) -> int:
    """Return the bytes of logits, and of what the loss derives from them.

    Training computes at most `TRAINED_LOGITS` logits at a time, or all of them if `whole`: the
    logits and their gradient in `dtype`, and in fp32 a copy, its softmax and its gradient.
    Evaluation keeps the logits of two models, and four fp32 tensors of a slice of the tokens.
    """
    vocab_size = base_model(model).config.get_text_config().vocab_size
    evaluation = vocab_size * (2 * tokens * dtype.itemsize + 4 * 4 * min(tokens, LOGIT_SLICE))
    logits = vocab_size * tokens
    training = (logits if whole else min(logits, TRAINED_LOGITS)) * (2 * dtype.itemsize + 12)
    return max(evaluation if evaluates else 0, training if trains else 0)


def _working(config: RunConfig, sizes: _Sizes, shards: int, dtype: torch.dtype) -> int:
    """Return the bytes to quantize a rank's part of the largest linear, or to compute with it.

    These do not happen at the same time, so the larger one counts. Quantizing weights that are
    copied to a GPU needs four copies, one of them in transit; weights generated there need two.
    The codes come on top. Computing needs the dequantized weight, and its cast for the product.
    """
    weights = 2 if config.model.source == "synthetic" else 4
    quantizing = (weights * dtype.itemsize + 2) * sizes.largest // shards
    return max(quantizing, 2 * dtype.itemsize * sizes.largest)


def _disk(
    config: RunConfig, sizes: _Sizes, dtype: torch.dtype, has_quantized: bool, has_checkpoints: bool
) -> dict[str, int]:
    """Return the bytes that the run's directory will grow by.

    A checkpoint contains the adapter and its two moments. A new checkpoint is written before an
    old one is deleted.
    """
    saves = config.task in ("finetune", "quantize") and config.quant.save and not has_quantized
    adapter = _adapter_itemsize(config) * sizes.adapter if config.task == "finetune" else 0
    checkpoints = 1 if has_checkpoints else config.ckpt.keep_last + config.ckpt.keep_best + 1
    return {
        "quantized/": sizes.packed + sizes.dense if saves else 0,
        "adapter/": adapter,
        "checkpoints/": checkpoints * 3 * adapter,
        "export": sizes.source * dtype.itemsize if config.task == "export" else 0,
    }
