"""Estimate the memory and disk of a run from shapes alone, before any weight is read.

Weights, gradients and optimizer state are exact; activations follow the formulas of
`activation_memory`. `memory_check` compares the estimate with what is available.
"""

from dataclasses import dataclass, field

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import nn

from hqqtrain.common.text import short
from hqqtrain.distributed.strategies.base import Strategy
from hqqtrain.loading.activation_memory import TrainingPeak
from hqqtrain.loading.calibrated_load import calibration_bytes
from hqqtrain.loading.reference_memory import reference_bytes
from hqqtrain.loading.workload import Workload
from hqqtrain.models.causal_lm import MAX_EVALUATION_TOKENS, MAX_TRAINING_LOGITS
from hqqtrain.models.families.structure import find_decoder_layers, text_config
from hqqtrain.models.fqn import expected_shapes, is_adapter
from hqqtrain.nn.hqq_linear import PACKED_PARAMETERS, HQQLinear

GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimated bytes of a run.

    Attributes:
        device: Bytes on the device of one rank, by purpose such as "packed weights". Their sum is
            the peak. A phase that needs less than another adds nothing: "logits" are the bytes by
            which the loss or the evaluation exceeds the backward pass.
        split: Purpose -> its bytes by smaller parts, for some purposes of `device`.
        disk: Bytes in the run's directory, by purpose.
        host: Bytes of one rank in the host's memory, offloaded or kept there beside a GPU.
        calibration: Bytes on the device of one rank while it is calibrated, with the weights.
    """

    device: dict[str, int] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)
    host: int = 0
    calibration: int = 0
    split: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Bytes on the device of one rank, all purposes together."""
        return sum(self.device.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{k} {short(v / GIB)}" for k, v in self.device.items() if v)
        memory, disk = self.peak / GIB, sum(self.disk.values()) / GIB
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
    sizes = ModelSizes.of(model, dtype)
    world_size = strategy.comm.size if world_size is None else world_size
    shards = strategy.parameter_shards(world_size)
    trained = _adapter_bytes(workload, sizes) if workload.trains else {}
    trained = {k: v // strategy.adapter_shards(world_size) for k, v in trained.items()}
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
        "adapter and optimizer": sum(trained.values()),
        "reference model": reference.whole,
    }
    root, layers = sizes.root, sizes.packed + sizes.dense - sizes.root
    gathered = strategy.gathered_bytes(
        world_size, root=root, layers=layers, itemsize=dtype.itemsize
    )
    peak = TrainingPeak.of(workload, model, dtype)
    activations = peak.kept + peak.layer
    quantizing = _quantizing_bytes(workload, sizes, shards, dtype)
    working = max(peak.working, quantizing - activations, reference.layer - activations)
    loss = _training_logits(workload, model, dtype, in_chunks=strategy.may_call_head_alone)
    evaluation = _evaluation_logits(workload, model, dtype)
    logits = max(loss - peak.layer, evaluation - activations) - working
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
        "activations": activations,
        "logits": max(0, logits),
        "working memory": working,
        "outputs of the reference model": reference.outputs if on_host else 0,
    }
    text = workload.calibration_tokens
    calibration = calibration_bytes(model, text, dtype, world_size=world_size)
    if calibration:  # before the model is trained
        calibration += parameters["packed weights"] + parameters["dense weights"]
    meta = 0 if strategy.offloads_meta else min(sizes.meta // shards, parameters["packed weights"])
    split = {
        "packed weights": {"codes": parameters["packed weights"] - meta, "scale and zero": meta},
        "adapter and optimizer": trained if parameters["adapter and optimizer"] else {},
    }
    return MemoryEstimate(device, _disk_bytes(workload, sizes, dtype), host, calibration, split)


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of the whole, unsharded model."""

    packed: int
    """Bytes of the packed weights."""
    meta: int
    """Bytes of their scale and zero."""
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
    def of(cls, model: nn.Module, dtype: torch.dtype) -> "ModelSizes":
        """Count the parameters of `model`; `dtype` is that of dense parameters."""
        packed = meta = dense = adapter = root = 0
        layers = find_decoder_layers(model)
        in_layers = set() if layers is None else set(layers.parameters())
        for name, param in model.named_parameters():
            if is_adapter(name):
                adapter += param.numel()
            elif name.rpartition(".")[2] in PACKED_PARAMETERS:
                packed += param.nbytes
                meta += 0 if name.endswith("W_q") else param.nbytes
            else:
                dense += param.numel() * dtype.itemsize
                if param not in in_layers:
                    root += param.numel() * dtype.itemsize
        source = sum(torch.Size(shape).numel() for shape in expected_shapes(model).values())
        layouts = [m.layout for m in model.modules() if isinstance(m, HQQLinear)]
        largest = max((x.out_features * x.in_features for x in layouts), default=0)
        return cls(packed, meta, dense, adapter, root, source, largest)


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


def _adapter_bytes(workload: Workload, sizes: ModelSizes) -> dict[str, int]:
    """Return the bytes of adapters, their gradients and AdamW's two moments.

    torch keeps the moments in the adapters' dtype, bitsandbytes in 8 or 32 bits.
    """
    itemsize = workload.adapter_itemsize
    moments = {"adamw": 2 * itemsize, "paged_adamw": 8}.get(workload.optimizer, 2)
    return {
        "adapters": sizes.adapter * itemsize,
        "gradients": sizes.adapter * itemsize,
        "optimizer state": sizes.adapter * moments,
    }


def _evaluation_logits(workload: Workload, model: nn.Module, dtype: torch.dtype) -> int:
    """Return the bytes of the logits of an evaluation, of two models if there is a reference.

    First there are all logits, and a copy of those of one model, without the tokens that are not
    predicted. Then chunks of them are fp32, and so are their logarithms of probabilities, which
    exist twice if there are several chunks. A batch has at least one window.
    """
    if not workload.evaluates:
        return 0
    vocab_size, tokens = text_config(model).vocab_size, max(workload.tokens, workload.eval_context)
    models = 1 if workload.reference == "off" else 2
    chunk_tokens = min(tokens, MAX_EVALUATION_TOKENS)
    copies = models + 1 + (models if tokens > chunk_tokens else 0)
    one_model = tokens * dtype.itemsize
    chunks = models * one_model + copies * 4 * chunk_tokens
    return vocab_size * max((models + 1) * one_model, chunks)


def _training_logits(
    workload: Workload, model: nn.Module, dtype: torch.dtype, *, in_chunks: bool
) -> int:
    """Return the bytes of the training's logits, and of what the loss derives from them.

    At most `MAX_TRAINING_LOGITS` exist at a time, or all of them without `in_chunks`: the logits
    and their gradient in `dtype`, and in fp32 a copy, its softmax and its gradient.
    """
    if not workload.trains:
        return 0
    number = text_config(model).vocab_size * workload.tokens
    number = min(number, MAX_TRAINING_LOGITS) if in_chunks else number
    return number * (2 * dtype.itemsize + 3 * 4)


def _quantizing_bytes(
    workload: Workload, sizes: ModelSizes, shards: int, dtype: torch.dtype
) -> int:
    """Return the bytes to quantize a rank's rows of the largest linear.

    Weights that are copied to a GPU need four copies, one of them in transit; weights generated
    there need two. The codes need 2 more bytes per weight.
    """
    copies = 2 if workload.is_synthetic else 4
    return (copies * dtype.itemsize + 2) * sizes.largest // shards


def _token_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Return the bytes to train rows of embeddings: PEFT copies the whole weight, and its gradient.

    The embeddings and the head do not do so at the same time, so the larger one counts.
    """
    layers = (m.base_layer for m in model.modules() if isinstance(m, TrainableTokensLayer))
    sizes = (sum(param.numel() for param in layer.parameters()) for layer in layers)
    return 2 * dtype.itemsize * max(sizes, default=0)


def _disk_bytes(workload: Workload, sizes: ModelSizes, dtype: torch.dtype) -> dict[str, int]:
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
